"""Requests of the API, in the shapes of OpenAI's current API and of vLLM's.

Fields that are not listed here are accepted, ignored, and logged once by name (`log_unknown_fields`).
"""

import logging
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

logger = logging.getLogger(__name__)

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_INT32 = 2**31 - 1  # of the engine's arrays
MAX_NGRAM = 64  # the engine compares as many tokens of all rows for each new token
MAX_FPS = 1000.0
MAX_LOGGED_FIELDS = 200  # names come from clients
_logged_fields: set[str] = set()

# Values at which a field that is not supported changes nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "user": (None, ""),
    "metadata": (None, {}),
    "detail": (None, "auto"),
    "name": (None, ""),
    "refusal": (None,),
    "annotations": (None, []),
    "tool_calls": (None, []),
    "function_call": (None,),
    "audio": (None,),
}


class ApiModel(BaseModel):
    """A JSON object of a request, which may have unknown fields."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class MediaUrl(ApiModel):
    """Where a media file is: a `data:` URL, an allowed https URL, or an allowed `file:` URL."""

    url: str


class InputAudio(ApiModel):
    """An audio file in base64. The format is detected from the content."""

    data: str
    format: str = "wav"


class FileReference(ApiModel):
    """An uploaded file, or a file as a `data:` URL."""

    file_id: str | None = None
    file_data: str | None = None
    filename: str | None = None


class TextPart(ApiModel):
    """A text."""

    type: Literal["text"]
    text: str


class ImagePart(ApiModel):
    """An image, or with `as_video` a frame of a video."""

    type: Literal["image_url"]
    image_url: MediaUrl


class VideoPart(ApiModel):
    """A video."""

    type: Literal["video_url"]
    video_url: MediaUrl


class AudioPart(ApiModel):
    """An audio file."""

    type: Literal["audio_url"]
    audio_url: MediaUrl


class InputAudioPart(ApiModel):
    """An audio file in base64."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class FilePart(ApiModel):
    """A file of any kind of media."""

    type: Literal["file"]
    file: FileReference


MediaPart = ImagePart | VideoPart | AudioPart | InputAudioPart | FilePart
ContentPart = Annotated[TextPart | MediaPart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    """Return a text as a list of one part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(ApiModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[ContentPart] | None, BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart] | None)
    ] = None


class VideoOptions(ApiModel):
    """Which frames of videos are sampled, as in `vllama chat`."""

    num_frames: int | None = None
    fps: float | None = Field(default=None, le=MAX_FPS)
    max_frames: int | None = None
    start: float | str | None = None
    end: float | str | None = None


class AudioOptions(ApiModel):
    """Which part of audio files is used: times in seconds, or texts as in `vllama chat`."""

    start: float | str | None = None
    end: float | str | None = None


class MediaOptions(ApiModel):
    """How media are read."""

    video: VideoOptions | None = None
    audio: AudioOptions | None = None


class ProcessorOptions(ApiModel):
    """How media are used."""

    use_audio_in_video: bool = True


class MediaFields(ApiModel):
    """The fields of a request about its media."""

    media_io_kwargs: MediaOptions | None = None
    mm_processor_kwargs: ProcessorOptions | None = None
    as_video: bool | None = None
    image_rate: float | None = Field(default=None, gt=0, le=1000)


class StreamOptions(ApiModel):
    """Options of a stream."""

    include_usage: bool = False


class GenerationFields(ApiModel):
    """The fields of a request about its answer. The defaults are those of `vllama chat`: greedy decoding."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = Field(default=None, le=1000)
    top_p: float | None = None
    top_k: int | None = Field(default=None, le=MAX_INT32)
    seed: int | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    repetition_penalty: float | None = Field(default=None, le=1000)
    min_tokens: int | None = None
    no_repeat_ngram_size: int | None = Field(default=None, le=MAX_NGRAM)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None


class ChatRequest(GenerationFields, MediaFields):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    continue_final_message: bool = False
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None


class CompletionRequest(GenerationFields):
    """The body of `POST /v1/completions`: a text without a template, or token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = False
    suffix: str | None = None


class EmbeddingRequest(MediaFields):
    """The body of `POST /v1/embeddings`: media as content parts, in `input` or in messages as in vLLM."""

    model: str | None = None
    input: list[ContentPart | str] | str | None = None
    messages: list[Message] | None = None
    encoding_format: Literal["float", "base64"] | None = "float"


def log_unknown_fields(request: BaseModel) -> None:
    """Log each field that is ignored, once for the process."""
    for name in _list_unknown_fields(request):
        is_new = name not in _logged_fields and len(_logged_fields) < MAX_LOGGED_FIELDS
        if is_new and name.isascii() and name.isidentifier():
            _logged_fields.add(name)
            logger.warning(f"requests have the field {name[:60]!r}, which is not supported and is ignored")


def _list_unknown_fields(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _list_unknown_fields(item)]
    if not isinstance(value, BaseModel):
        return []
    extra = value.model_extra or {}
    found = [name for name, item in extra.items() if item not in _WITHOUT_EFFECT.get(name, (None,))]
    for name in type(value).model_fields:
        found += _list_unknown_fields(getattr(value, name))
    return found
