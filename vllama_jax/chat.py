"""Conversations about media files, with streamed answers (reference: conversation_video.py)."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllama_jax.config import GREEDY, GenerationConfig
from vllama_jax.errors import VllamaError
from vllama_jax.media import FrameSampling, MediaReport, MediaSource, open_source
from vllama_jax.media_tokens import (
    DEFAULT_SAMPLING,
    EncodedMedia,
    PreparedMedia,
    encode_media,
    encode_segments,
    prepare_media,
    resolve_sampling,
)
from vllama_jax.segments import check_segments_fit, open_segments
from vllama_jax.text import prompts
from vllama_jax.text.templates import ChatTemplate

if TYPE_CHECKING:
    import jax

    from vllama_jax import generate
    from vllama_jax.model import Model


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
        with self._exclusive_use(), open_source(source, allow_url=allow_url) as opened:
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
