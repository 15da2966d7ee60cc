"""Conversations about media files, with streamed answers (reference: conversation_video.py)."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllama_jax import media as media_files
from vllama_jax.branches import BRANCHES, Branch, get_branches
from vllama_jax.config import GREEDY, GenerationConfig, VideoLlamaConfig
from vllama_jax.errors import ConfigError, MediaError, VllamaError
from vllama_jax.media import Audio, FrameSampling, Image, MediaReport, MediaSource, Video
from vllama_jax.segments import SegmentedMedia, check_segments_fit, combine_reports, open_segments
from vllama_jax.text import prompts
from vllama_jax.text.templates import ChatTemplate
from vllama_jax.towers import get_tower

if TYPE_CHECKING:
    import jax

    from vllama_jax import generate
    from vllama_jax.model import Model
    from vllama_jax.nn.video_llama import VideoLlama


DEFAULT_SAMPLING = FrameSampling()


@dataclasses.dataclass(frozen=True)
class PreparedMedia:
    """The arrays of a media file that the network takes.

    Attributes:
        report: What was read from the file.
        frames: Normalized frames [t, h, w, 3]; None for audio.
        mel: Log-mel spectrograms of audio clips [s, 128, 204]; None without audio.
        seconds: Timestamps of the frames of a video, in seconds.
        clip_starts: Start of each audio clip, in seconds since the first sample; empty without audio.
    """

    report: MediaReport
    frames: np.ndarray | None
    mel: np.ndarray | None
    seconds: tuple[float, ...] = ()
    clip_starts: tuple[float, ...] = ()

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that the file has, by name: that of the audio precedes that of the frames, as in a prompt."""
        arrays = {"mel": self.mel, "frames": self.frames}
        return {name: array for name, array in arrays.items() if array is not None}

    @property
    def prompt_media(self) -> prompts.Media:
        """The description of the file for a prompt."""
        return prompts.Media(self.report.kind, self.mel is not None and self.frames is not None, self.seconds)


@dataclasses.dataclass(frozen=True)
class EncodedMedia:
    """A media file that was encoded.

    Attributes:
        tokens: Its media tokens [n, width of the language model], in the order of the prompt.
        prompt_media: Its description for a prompt.
        report: What was read from the file.
    """

    tokens: "list[jax.Array]"
    prompt_media: prompts.Media
    report: MediaReport


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a question.

    Attributes:
        answer: The text.
        tokens: The new token ids, without the initial dummy BOS.
        timings: Seconds until the first text ("first_text") and until the end ("answer").
        logprobs: The log-probabilities of the tokens, before penalties and temperature. Beam search has none.
        top_logprobs: The most probable tokens at each position and their log-probabilities, as many as the option
            `top_logprobs`.
        prefill_tokens: The number of tokens of the prompt that were computed. Those of earlier turns are cached.
    """

    answer: str
    tokens: list[int]
    timings: dict[str, float]
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prefill_tokens: int = 0


def check_num_frames(config: VideoLlamaConfig, option: str, num_frames: int | None, advice: str) -> None:
    """Check that a model has learned positions for a number of frames.

    Args:
        config: The model's config.
        option: The name of the option with the number, for the error message.
        num_frames: The number of frames; None is always valid.
        advice: What to do instead, for the error message.

    Raises:
        ConfigError: The number is larger than that of the learned positions.
    """
    if (num_frames or 0) > config.num_frame_positions:
        raise ConfigError(
            f"{option} {num_frames}, but the model has {config.num_frame_positions} learned frame positions; {advice}"
        )


def prepare_media(
    source: MediaSource,
    config: VideoLlamaConfig,
    *,
    sampling: FrameSampling = DEFAULT_SAMPLING,
    num_frames: int | None = None,
    audio: bool = True,
    require_audio: bool = False,
    interpolate_positions: bool = False,
    allow_url: bool = False,
) -> PreparedMedia:
    """Read and preprocess a video, an image or audio for a model. Needs neither the model's weights nor jax.

    Args:
        source: A file, a directory of images, bytes, a file object, arrays or a URL; see `media.open_source`.
        config: The model's config.
        sampling: Which frames of a video are sampled, and from which window; by default `config.num_frames` of all.
        num_frames: Short for `FrameSampling(num_frames=…)`.
        audio: Whether to use the audio of a video.
        require_audio: Raise an error if the file's audio is not used.
        interpolate_positions: Accept more frames of `sampling.fps` than the model has learned positions.
        allow_url: Whether http and https URLs are downloaded.

    Raises:
        MediaError: The source cannot be used, or its audio is required and was not used.
        ConfigError: The number of frames is below 1 or above that of the learned positions.
    """
    sampling = resolve_sampling(sampling, num_frames, config)
    limit = None if interpolate_positions else config.num_frame_positions
    size, clips = config.vit.image_size, config.num_clips
    media = media_files.read_media(source, sampling, size, audio, clips, max_positions=limit, allow_url=allow_url)
    return preprocess_media(media, config, require_audio=require_audio)


def resolve_sampling(sampling: FrameSampling, num_frames: int | None, config: VideoLlamaConfig) -> FrameSampling:
    """Return a sampling that has a number of frames or a rate: `num_frames`, or else the model's number.

    Raises:
        ConfigError: `num_frames` is below 1, or given in addition to those of `sampling`.
    """
    if num_frames is not None:
        if num_frames < 1:
            raise ConfigError(f"the number of frames must be at least 1, not {num_frames}")
        if sampling.num_frames is not None:
            raise ConfigError("num_frames is given twice: omit it, or that of the sampling")
        sampling = dataclasses.replace(sampling, num_frames=num_frames)
    if sampling.num_frames is None and sampling.fps is None:
        sampling = dataclasses.replace(sampling, num_frames=config.num_frames)
    return sampling


def preprocess_media(
    media: Video | Image | Audio, config: VideoLlamaConfig, *, require_audio: bool = False
) -> PreparedMedia:
    """Preprocess media that `media.read_media` returned: normalize frames and compute spectrograms.

    Args:
        media: The media.
        config: The model's config.
        require_audio: Raise an error if the file's audio is not used.

    Raises:
        MediaError: The file has only audio, which cannot be used, or its audio is required and was not used.
    """
    report, mel = media.report, _compute_mel(media, config.num_clips)
    path = report.path
    if mel is not None and all(branch.prompt_array != "mel" for branch in get_branches(config)):
        report, mel = dataclasses.replace(report, audio="unsupported"), None
    if report.kind == "audio" and mel is None:
        raise MediaError(f"{path}: the file has only audio, which cannot be used: {report}")
    if require_audio and report.audio != "used":
        raise MediaError(f"{path}: the audio is required, but was not used: {report}")
    tower = get_tower(config.vit)
    frames = None if isinstance(media, Audio) else media_files.normalize(media.frames, tower.mean, tower.std)
    seconds = tuple(media.timestamps) if isinstance(media, Video) else ()
    clip_starts = () if mel is None else _list_clip_starts(media, config.num_clips)
    return PreparedMedia(report, frames, mel, seconds, clip_starts)


def _compute_mel(media: Video | Image | Audio, num_clips: int) -> np.ndarray | None:
    """Return the log-mel spectrograms of audio, which may have been read without `num_clips`; None without audio."""
    if isinstance(media, Image):
        return None
    if media.waveform is not None and media.sample_rate is not None:
        return media_files.mel_clips(media.waveform, media.sample_rate, num_clips)
    return media.mel


def _list_clip_starts(media: Video | Image | Audio, num_clips: int) -> tuple[float, ...]:
    """Return the start of each audio clip, in seconds since the first sample."""
    duration = media.audio_duration if isinstance(media, Video) else media.report.duration
    if isinstance(media, Video) and media.waveform is not None and media.sample_rate is not None:
        duration = media.waveform.shape[1] / media.sample_rate
    return () if duration is None else media_files.clip_start_seconds(duration, num_clips)


def encode_media(
    network: "VideoLlama", prepared: PreparedMedia, *, interpolate_positions: bool = False
) -> "list[jax.Array]":
    """Encode a media file to media tokens.

    Args:
        network: The model's network.
        prepared: The file, as `prepare_media` returns it.
        interpolate_positions: Interpolate the learned positions for more frames than the model has positions.

    Returns:
        Tokens [n, width of the language model], first of the audio, then of the frames, if the file has them.

    Raises:
        ConfigError: There are more frames than learned positions, and `interpolate_positions` is false.
    """
    import jax.numpy as jnp

    arrays = prepared.arrays
    branches = [branch for name in arrays for branch in network.branches if branch.prompt_array == name]

    def encode(branch: Branch) -> "jax.Array":
        return _encode(network, branch.name, arrays[branch.prompt_array], interpolate=interpolate_positions)

    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:  # branches compile in parallel
        encoded = list(zip(branches, pool.map(encode, branches), strict=True))
    by_array = [[tokens for branch, tokens in encoded if branch.prompt_array == name] for name in arrays]
    return [tokens[0] if len(tokens) == 1 else jnp.concatenate(tokens) for tokens in by_array if tokens]


def encode_segments(
    model: "Model", file: SegmentedMedia, *, require_audio: bool = False, interpolate_positions: bool = False
) -> EncodedMedia:
    """Read and encode the segments of a file one at a time. Only their media tokens are kept.

    Args:
        model: The model.
        file: The file, whose sampling has a number of frames (`resolve_sampling`).
        require_audio: Raise an error if the audio of a segment is not used.
        interpolate_positions: Interpolate the learned positions for more frames than the model has positions.

    Raises:
        MediaError: The file cannot be used, or its audio is required and was not used.
        ConfigError: There are more frames than learned positions, and `interpolate_positions` is false.
    """
    config = model.config
    size, clips = config.vit.image_size, config.num_clips
    tokens, segments, reports = [], [], []
    for span, media in media_files.read_segments(file.source, file.sampling, size, file.audio, clips):
        prepared = preprocess_media(media, config, require_audio=require_audio)
        tokens += encode_media(model.network, prepared, interpolate_positions=interpolate_positions)
        segments.append(dataclasses.replace(prepared.prompt_media, time_range=span))
        reports.append(prepared.report)
    return EncodedMedia(tokens, prompts.Media(segments[0].kind, segments=tuple(segments)), combine_reports(reports))


def embed_prompt(
    model: "Model",
    conversation: prompts.Conversation,
    media: "Sequence[jax.Array]",
    max_new_tokens: int,
    answer_prefix: str = "",
) -> "generate.EmbeddedPrompt":
    """Build the prompt of a conversation for `generate`.

    Args:
        model: The model.
        conversation: The conversation, which ends with a question.
        media: The media tokens of its files from `encode_media`, in order.
        max_new_tokens: The maximum number of new tokens.
        answer_prefix: Text that the answer starts with. The model continues from it.

    Raises:
        ConfigError: The prompt and the answer are longer than the model's context.
    """
    from vllama_jax import generate

    cfg = model.network.llama.cfg
    text = (
        *prompts.build_prompt(conversation),
        conversation.template.answer_prefix + answer_prefix if answer_prefix else "",
    )
    encoded = prompts.encode_prompt(model.tokenizer, text, [len(tokens) for tokens in media])
    generate.check_context_length(len(encoded.ids), max_new_tokens, cfg)
    media_tokens = [np.asarray(tokens) for tokens in media] or [np.zeros((0, cfg.width), np.float32)]
    return generate.EmbeddedPrompt(encoded.ids, encoded.is_media, np.concatenate(media_tokens))


def make_engine(model: "Model", rows: int, **options: Any) -> "generate.Engine":
    """Create an engine for a model that decodes this number of answers at a time.

    Args:
        model: The model.
        rows: The number of answers.
        **options: Other arguments of `generate.Engine`, such as `int8_cache`.
    """
    from vllama_jax import generate

    llama, tokenizer = model.network.llama, model.tokenizer
    return generate.Engine(llama, rows=rows, bos=tokenizer.bos_id, eos=tokenizer.eos_ids, **options)


def search_beams(model: "Model", request: "generate.Request", *, int8_cache: bool = False) -> "generate.Generation":
    """Answer a request with beam search."""
    from vllama_jax import generate

    llama, tokenizer = model.network.llama, model.tokenizer
    return generate.search_beams(llama, request, bos=tokenizer.bos_id, eos=tokenizer.eos_ids, int8_cache=int8_cache)


class Chat:
    """A conversation with a model about media files.

    Threads can share a model, but each needs its own `Chat`: concurrent use of one raises `VllamaError`.

    Args:
        model: The model, as `vllama_jax.load` returns it.
        template: The name of the prompt template; by default the model's own.
        system: The system text; by default the original's text for the media in the conversation.
        int8_cache: Whether to store the KV cache in int8, which halves its memory and changes answers slightly.

    Attributes:
        model: The model.
        last: The last complete answer; None before there is one.

    Raises:
        ConfigError: The template does not exist, or the tokenizer lacks its special tokens.

    Example:
        >>> import vllama_jax as vl
        >>> from vllama_jax.checkpoints.shipped import find_clip
        >>> chat = vl.Chat(vl.load("miniature"))
        >>> print(chat.add(find_clip("demo")))
        8 frames of 4.0 s; audio used
        >>> "".join(chat.ask("Which way does it go?"))
        'it moves to the left'
    """

    def __init__(
        self, model: "Model", template: str | None = None, system: str | None = None, *, int8_cache: bool = False
    ):
        self.model = model
        self._int8_cache = int8_cache
        self.last: Answer | None = None
        name = template or model.config.template
        self._start = prompts.start_conversation(name, model.config.has_audio, system)
        prompts.check_special_tokens(self._start.template, model.tokenizer, name)
        self._lock = threading.Lock()
        self._active_threads: list[int] = []  # the thread of each call that has not ended
        self.reset()

    @property
    def files(self) -> tuple[MediaReport, ...]:
        """The reports of the conversation's files, in the order in which they were added."""
        return self._files

    def reset(self) -> None:
        """Remove all turns and all files from the conversation."""
        with self._exclusive_use():
            self._conversation = self._start
            self._tokens: list[jax.Array] = []  # media tokens [n, width of the language model], in the prompt's order
            self._engine: generate.Engine | None = None  # has the KV cache of the turns
            self._files: tuple[MediaReport, ...] = ()

    def undo(self) -> str:
        """Remove the last question and its answer. Files stay, also those that were added after the answer.

        Returns:
            The question.

        Raises:
            VllamaError: There is no question.
        """
        with self._exclusive_use():
            questions = [turn.question for turn in self._conversation.turns if turn.question is not None]
            if not questions:
                raise VllamaError("the conversation has no question that could be removed")
            self._conversation = self._conversation.undo()
        return questions[-1]

    def add(
        self,
        source: MediaSource,
        *,
        sampling: FrameSampling = DEFAULT_SAMPLING,
        num_frames: int | None = None,
        audio: bool = True,
        require_audio: bool = False,
        interpolate_positions: bool = False,
        max_new_tokens: int = GREEDY.max_new_tokens,
        allow_url: bool = False,
    ) -> MediaReport:
        """Add media to the conversation, for the questions that follow.

        Args:
            source: A video, an image or audio: a file, a directory of images, bytes, a file object, arrays or a URL;
                see `media.open_source`.
            sampling: Which frames of a video are sampled, and from which window. With several segments, they are read
                and encoded one at a time, after a check that they fit the model's context.
            num_frames: Short for `FrameSampling(num_frames=…)`; by default the model's `num_frames`.
            audio: Whether to use the audio of a video.
            require_audio: Raise an error if the file's audio is not used.
            interpolate_positions: Interpolate the learned positions for more frames than the model has positions.
            max_new_tokens: The maximum length of an answer, which segments leave room for in the context.
            allow_url: Whether http and https URLs are downloaded.

        Returns:
            A report of the frames and the audio that are used.

        Raises:
            MediaError: The source cannot be used, or its audio is required and was not used.
            ConfigError: The number of frames is below 1, or above the number of learned positions without
                interpolation, or there are more segments than fit the context.
        """
        sampling = resolve_sampling(sampling, num_frames, self.model.config)
        options = {"require_audio": require_audio, "interpolate_positions": interpolate_positions}
        with self._exclusive_use(), media_files.open_source(source, allow_url=allow_url) as opened:
            if sampling.segments > 1:
                model, file = self.model, open_segments(opened, sampling, audio)
                check_segments_fit([file], model.config, model.tokenizer, self._conversation, max_new_tokens)
                return self._add_encoded(encode_segments(model, file, **options))
            prepared = prepare_media(opened, self.model.config, sampling=sampling, audio=audio, **options)
            return self.add_prepared(prepared, interpolate_positions=interpolate_positions)

    def add_prepared(self, prepared: PreparedMedia, *, interpolate_positions: bool = False) -> MediaReport:
        """Add a media file that `prepare_media` has read.

        Args:
            prepared: The file.
            interpolate_positions: Interpolate the learned positions for more frames than the model has positions.

        Raises:
            ConfigError: There are more frames than learned positions, and `interpolate_positions` is false.
        """
        with self._exclusive_use():
            tokens = encode_media(self.model.network, prepared, interpolate_positions=interpolate_positions)
            return self._add_encoded(EncodedMedia(tokens, prepared.prompt_media, prepared.report))

    def _add_encoded(self, encoded: EncodedMedia) -> MediaReport:
        self._tokens = self._tokens + encoded.tokens
        self._conversation = self._conversation.add(encoded.prompt_media)
        self._files = (*self._files, encoded.report)
        return encoded.report

    def ask(self, question: str, **options: Any) -> Iterator[str]:
        """Ask a question about the added files and stream the answer.

        At the end of the stream, `last` has the complete answer, and the conversation has the new turn. If the stream
        is not read to its end, the conversation stays unchanged.

        Args:
            question: The question.
            **options: Fields of `GenerationConfig`, such as `max_new_tokens` and `temperature`.

        Yields:
            The answer in consecutive pieces of text.

        Raises:
            ConfigError: An option is invalid, or the conversation is longer than the model's context.
            VllamaError: Another thread uses this `Chat`, or the conversation has changed before the end of the answer.
        """
        from vllama_jax import generate

        config = GenerationConfig(**options)
        with self._exclusive_use():
            before = self._conversation
            conversation = before.ask(question)
            template = dataclasses.replace(conversation.template, more_stops=config.stop)
            request = generate.Request(
                prompt=embed_prompt(self.model, conversation, self._tokens, config.max_new_tokens),
                config=config,
                stops=prompts.stop_sequences(self.model.tokenizer, template),
            )
        return self._stream(before, conversation, template, request)

    def _stream(
        self,
        before: prompts.Conversation,
        conversation: prompts.Conversation,
        template: ChatTemplate,
        request: "generate.Request",
    ) -> Iterator[str]:
        tokenizer, start, first, texts = self.model.tokenizer, time.perf_counter(), None, []
        with self._exclusive_use():
            self._check_unchanged(before)
            generation, batches = self._generate(request)
            with contextlib.closing(batches):
                for text in prompts.stream_answer(tokenizer, template, batches):
                    first = first or time.perf_counter() - start
                    texts.append(text)
                    yield text
            self._check_unchanged(before)
            total = time.perf_counter() - start
            self.last = Answer(
                "".join(texts),
                generation.tokens,
                {"first_text": first or total, "answer": total},
                generation.logprobs,
                generation.top_logprobs,
                generation.prefill_tokens,
            )
            self._conversation = conversation.answer(
                *prompts.decode_past_answer(tokenizer, template, generation.tokens)
            )

    def _generate(self, request: "generate.Request") -> "tuple[generate.Generation, Generator[list[int]]]":
        """Return the answer to a request, and a generator of its new tokens, which extends it."""
        if request.config.num_beams > 1:
            generation = search_beams(self.model, request, int8_cache=self._int8_cache)
            return generation, (tokens for tokens in [generation.tokens])
        if self._engine is None:
            self._engine = make_engine(self.model, rows=1, int8_cache=self._int8_cache)
        engine = self._engine
        generation = engine.add(request)

        def decode() -> Generator[list[int]]:
            count = 0
            try:
                while generation.finish_reason is None:
                    engine.step()
                    yield generation.tokens[count:]
                    count = len(generation.tokens)
            finally:
                engine.cancel(generation)

        return generation, decode()

    def _check_unchanged(self, before: prompts.Conversation) -> None:
        if self._conversation is not before:
            raise VllamaError("the conversation has changed since this question was asked; ask it again")

    @contextlib.contextmanager
    def _exclusive_use(self) -> Iterator[None]:
        """Make calls from other threads raise VllamaError.

        Calls from the same thread are allowed, so it can ask again after it has left an answer unread.
        """
        thread = threading.get_ident()
        with self._lock:
            if any(other != thread for other in self._active_threads):
                raise VllamaError(
                    "another thread is using this Chat; create a Chat for each thread (they can share the model)"
                )
            self._active_threads.append(thread)
        try:
            yield
        finally:
            with self._lock:
                self._active_threads.remove(thread)


def _encode(network: "VideoLlama", branch: str, array: np.ndarray, *, interpolate: bool) -> "jax.Array":
    """Encode the frames or spectrograms of one file to tokens [n, width]. Compiles once for each number of them."""
    from vllama_jax.sharding import get_mesh, use_mesh

    with use_mesh(get_mesh(network)):
        return _compile_encoder(branch, interpolate)(network, array[None])[0]


@functools.cache
def _compile_encoder(name: str, interpolate: bool) -> "Callable[[VideoLlama, np.ndarray], jax.Array]":
    import jax

    branch = BRANCHES[name]
    encoder = branch.encoders[branch.prompt_array]

    def encode(network: "VideoLlama", array: "jax.Array") -> "jax.Array":
        return branch.tokens(network, encoder.encode(network, array), interpolate_positions=interpolate)

    return jax.jit(encode)
