"""A conversation about files: questions, and streamed answers (reference: conversation_video.py)."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllama_jax import media as media_files
from vllama_jax.branches import BRANCHES, Branch, get_branches
from vllama_jax.config import GenerationConfig, VideoLlamaConfig
from vllama_jax.errors import ConfigError, MediaError, VllamaError
from vllama_jax.media import Audio, Image, MediaReport, Video
from vllama_jax.text import prompts
from vllama_jax.towers import get_tower

if TYPE_CHECKING:
    import jax

    from vllama_jax import generate
    from vllama_jax.model import Model
    from vllama_jax.nn.video_llama import VideoLlama


@dataclasses.dataclass(frozen=True)
class PreparedMedia:
    """A file as the network takes it: normalised frames [t, h, w, 3], mel [s, 128, 204], None where there is none."""

    report: MediaReport
    frames: np.ndarray | None
    mel: np.ndarray | None
    seconds: tuple[float, ...] = ()

    @property
    def prompt_media(self) -> prompts.Media:
        return prompts.Media(self.report.kind, self.mel is not None and self.frames is not None, self.seconds)


@dataclasses.dataclass(frozen=True)
class Answer:
    """The text, the new token ids without the dummy BOS, and seconds until the first piece and in all."""

    answer: str
    tokens: list[int]
    timings: dict[str, float]


def check_num_frames(config: VideoLlamaConfig, option: str, num_frames: int | None, advice: str) -> None:
    """Raises ConfigError where more frames are asked for than the model has learned positions for."""
    if (num_frames or 0) > config.num_frame_positions:
        told = f"{option} {num_frames}, but the model has learned {config.num_frame_positions} positions"
        raise ConfigError(f"{told}; {advice}")


def prepare_media(
    path: str | Path,
    config: VideoLlamaConfig,
    *,
    num_frames: int | None = None,
    audio: bool = True,
    require_audio: bool = False,
) -> PreparedMedia:
    """Reads a video, a picture or a sound file for a model; needs no weights and no jax.

    num_frames: how many to take from a video, the config's own number unless given. audio=False leaves sound out.
    Raises MediaError for a file that cannot be used, and, with `require_audio`, for one whose sound is not used;
    ConfigError for less than one frame.
    """
    wanted = config.num_frames if num_frames is None else num_frames
    if wanted < 1:
        raise ConfigError(f"{wanted} frames were asked for; ask for at least 1")
    found = media_files.read_media(path, wanted, config.vit.image_size, audio, config.num_clips)
    return preprocess_media(found, config, require_audio=require_audio)


def preprocess_media(
    found: Video | Image | Audio, config: VideoLlamaConfig, *, require_audio: bool = False
) -> PreparedMedia:
    """What was read from a file, as the network takes it. Raises MediaError as `prepare` does."""
    report, mel = found.report, _mel(found, config.num_clips)
    path = report.path
    if mel is not None and all(branch.prompt_array != "mel" for branch in get_branches(config)):
        report, mel = dataclasses.replace(report, audio="unsupported"), None
    if report.kind == "audio" and mel is None:
        raise MediaError(f"{path}: there is only sound in it, and it cannot be used: {report}")
    if require_audio and report.audio != "used":
        raise MediaError(f"{path}: its sound is required and was not used: {report}")
    tower = get_tower(config.vit)
    frames = None if isinstance(found, Audio) else media_files.normalize(found.frames, tower.mean, tower.std)
    return PreparedMedia(report, frames, mel, tuple(found.timestamps) if isinstance(found, Video) else ())


def _mel(found: Video | Image | Audio, num_clips: int) -> np.ndarray | None:
    """The mel clips of a file's audio, also where it was read without `num_clips`; None where there is none."""
    if isinstance(found, Image):
        return None
    if found.waveform is not None and found.sample_rate is not None:
        return media_files.mel_clips(found.waveform, found.sample_rate, num_clips)
    return found.mel


def encode_media(
    network: "VideoLlama", prepared: PreparedMedia, *, interpolate_positions: bool = False
) -> "list[jax.Array]":
    """Tokens [n, width] for each place that a file has in a prompt, in order: of its sound, then of its frames."""
    import jax.numpy as jnp

    arrays = {"mel": prepared.mel, "frames": prepared.frames}
    given = {name: array for name, array in arrays.items() if array is not None}
    used = [branch for array in given for branch in network.branches if branch.prompt_array == array]

    def encode(branch: Branch) -> "jax.Array":
        return _encode(network, branch.name, given[branch.prompt_array], interpolate=interpolate_positions)

    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:  # branches compile side by side
        encoded = list(zip(used, pool.map(encode, used), strict=True))
    found = [[tokens for branch, tokens in encoded if branch.prompt_array == array] for array in given]
    return [tokens[0] if len(tokens) == 1 else jnp.concatenate(tokens) for tokens in found if tokens]


def embed_prompt(
    model: "Model",
    conversation: prompts.Conversation,
    media: "Sequence[jax.Array]",
    max_new_tokens: int,
    answer_prefix: str = "",
) -> "generate.EmbeddedPrompt":
    """A conversation's prompt as `generate` takes it. `media`: what `encode_media` gave for its files, in order.

    begun: how the answer begins; it goes on from there. Raises ConfigError when prompt and answer do not fit the
    model's context.
    """
    import jax.numpy as jnp

    from vllama_jax import generate

    cfg = model.network.llama.cfg
    text = (
        *prompts.build_prompt(conversation),
        conversation.template.answer_prefix + answer_prefix if answer_prefix else "",
    )
    encoded = prompts.encode_prompt(model.tokenizer, text, [len(tokens) for tokens in media])
    generate.check_context_length(len(encoded.ids), max_new_tokens, cfg)
    shown = jnp.concatenate(media) if media else jnp.zeros((0, cfg.width))
    return generate.EmbeddedPrompt(encoded.ids, encoded.is_media, shown)


class Chat:
    """A conversation with a model.

    Threads can share a model, each with a Chat of its own. A Chat that two threads use at once raises VllamaError.

    template: the prompt template, the model's own unless given. system: the system text, the original's for what is
    shown unless given. Raises ConfigError for a template that does not exist or does not fit the tokenizer.

    Example:
        >>> import vllama_jax as vl
        >>> from vllama_jax.checkpoints.shipped import find_clip
        >>> chat = vl.Chat(vl.load("miniature"))
        >>> print(chat.add(find_clip("demo")))
        8 frames of 4.0 s; audio used
        >>> "".join(chat.ask("Which way does it go?"))
        'it moves to the left'
    """

    def __init__(self, model: "Model", template: str | None = None, system: str | None = None):
        self.model = model
        self.last: Answer | None = None
        name = template or model.config.template
        self._start = prompts.start_conversation(name, model.config.has_audio, system)
        prompts.check_special_tokens(self._start.template, model.tokenizer, name)
        self._lock = threading.Lock()
        self._users: list[int] = []  # the thread of each use that has not ended
        self.reset()

    def reset(self) -> None:
        """Forgets all turns and all files."""
        with self._used():
            self._conversation = self._start
            self._tokens: list[jax.Array] = []  # of each place for media, in order: [n, width of the language model]

    def add(
        self,
        path: str | Path,
        *,
        num_frames: int | None = None,
        audio: bool = True,
        require_audio: bool = False,
        interpolate_positions: bool = False,
    ) -> MediaReport:
        """Shows the model a file, for the questions that follow; the report says what was seen and heard.

        interpolate_positions: allows more frames than the model has learned positions for.
        Raises MediaError and ConfigError as `prepare` does, and ConfigError for more frames than positions.
        """
        with self._used():
            prepared = prepare_media(
                path, self.model.config, num_frames=num_frames, audio=audio, require_audio=require_audio
            )
            return self.add_prepared(prepared, interpolate_positions=interpolate_positions)

    def add_prepared(self, prepared: PreparedMedia, *, interpolate_positions: bool = False) -> MediaReport:
        """Shows the model a file that was read before."""
        with self._used():
            tokens = encode_media(self.model.network, prepared, interpolate_positions=interpolate_positions)
            self._tokens = self._tokens + tokens
            self._conversation = self._conversation.add(prepared.prompt_media)
        return prepared.report

    def ask(self, question: str, **options: Any) -> Iterator[str]:
        """Streams the answer to a question, about the files shown and all that was said; `last` has it whole, after.

        options: the fields of config.GenerationConfig. An answer that is not read to its end is forgotten.
        Raises ConfigError for options that mean nothing, and when the conversation does not fit the model's context;
        VllamaError when another thread uses this Chat, or when the conversation has changed before the answer's end.
        """
        from vllama_jax import generate

        tokenizer = self.model.tokenizer
        config = GenerationConfig(**options)
        with self._used():
            before, tokens = self._conversation, self._tokens
        conversation = before.ask(question)
        batches = generate.generate(
            self.model.network.llama,
            [embed_prompt(self.model, conversation, tokens, config.max_new_tokens)],
            config,
            bos=tokenizer.bos_id,
            eos=tokenizer.eos_ids,
            stops=prompts.stop_sequences(tokenizer, conversation.template),
        )
        return self._stream(before, conversation, batches)

    def _stream(
        self, before: prompts.Conversation, conversation: prompts.Conversation, batches: Iterator[list[list[int]]]
    ) -> Iterator[str]:
        start, first, ids, pieces = time.perf_counter(), None, [], []

        def collected() -> Iterator[list[int]]:
            for (batch,) in batches:
                ids.extend(batch)
                yield batch

        with self._used():
            self._check_unchanged(before)
            for piece in prompts.stream_answer(self.model.tokenizer, conversation.template, collected()):
                first = first or time.perf_counter() - start
                pieces.append(piece)
                yield piece
            self._check_unchanged(before)
            total = time.perf_counter() - start
            self.last = Answer("".join(pieces), ids, {"first_piece": first or total, "answer": total})
            self._conversation = conversation.answer(
                *prompts.decode_past_answer(self.model.tokenizer, conversation.template, ids)
            )

    def _check_unchanged(self, before: prompts.Conversation) -> None:
        if self._conversation is not before:
            raise VllamaError("the conversation has changed since this question was asked; ask it again")

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        """Raise VllamaError in other threads meanwhile. A thread may begin anew where it left an answer unread."""
        thread = threading.get_ident()
        with self._lock:
            if any(other != thread for other in self._users):
                raise VllamaError(
                    "another thread is using this Chat; give each thread a Chat of its own (they can share the model)"
                )
            self._users.append(thread)
        try:
            yield
        finally:
            with self._lock:
                self._users.remove(thread)


def _encode(network: "VideoLlama", branch: str, given: np.ndarray, *, interpolate: bool) -> "jax.Array":
    """A branch's tokens [n, width] of one file's frames or mel, by a program compiled once for each number of them."""
    from vllama_jax.sharding import get_mesh, use_mesh

    with use_mesh(get_mesh(network)):
        return _encoder(branch, interpolate)(network, given[None])[0]


@functools.cache
def _encoder(name: str, interpolate: bool) -> "Callable[[VideoLlama, np.ndarray], jax.Array]":
    import jax

    branch = BRANCHES[name]
    encoder = branch.encoders[branch.prompt_array]

    def encode(network: "VideoLlama", given: "jax.Array") -> "jax.Array":
        return branch.tokens(network, encoder.encode(network, given), interpolate_positions=interpolate)

    return jax.jit(encode)
