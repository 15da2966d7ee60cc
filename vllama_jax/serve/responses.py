"""Responses of the API. Fields that are not set are omitted."""

import json
import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorInfo(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of all responses with a status from 400 on."""

    error: ErrorInfo


class MediaInfo(BaseModel):
    """What was used of a media file.

    Attributes:
        part: The field of the request that the file is from.
        kind: Its kind of media.
        summary: The report in one line.
        num_frames: The number of sampled frames.
        frame_times: Their times in the video, in seconds.
        duration: Of the file or of the window that was read, in seconds.
        audio: "used", "absent", "off", "unsupported" (the model has no audio branch) or "failed: " and the reason.
        audio_clip_times: Start and end of each audio clip, in seconds since the first sample of the window.
        notes: Other remarks.
        cached: Whether the file had been encoded for an earlier request.
    """

    part: str
    kind: Literal["video", "image", "audio"]
    summary: str
    num_frames: int
    frame_times: list[float]
    duration: float
    audio: str
    audio_clip_times: list[tuple[float, float]]
    notes: list[str]
    cached: bool


class Details(BaseModel):
    """What this server reports in addition to OpenAI's fields."""

    media: list[MediaInfo]


class PromptTokensDetails(BaseModel):
    """The tokens of a prompt that were computed before."""

    cached_tokens: int


class Usage(BaseModel):
    """The number of tokens. Media tokens are part of the prompt."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the most probable tokens at its position."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """The log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the answers to a request."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The response to `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    vllama: Details


class Delta(BaseModel):
    """New text of an answer. The first has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """What is new of an answer."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    """An event of a stream. The first has `vllama`; the last has `usage`, if it was requested."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    vllama: Details | None = None


class CompletionLogprobs(BaseModel):
    """The log-probabilities of a completion, in the older shape."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(BaseModel):
    """A completion, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """The response to `POST /v1/completions`, and an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Embedding(BaseModel):
    """The vector of a file: a list of numbers, or little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """The response to `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    vllama: Details


class ModelInfo(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vllama_jax"
    max_model_len: int


class ModelList(BaseModel):
    """The response to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class FileInfo(BaseModel):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """The response to `GET /v1/files`."""

    object: Literal["list"] = "list"
    data: list[FileInfo]
    has_more: bool = False


class DeletedFile(BaseModel):
    """The response to `DELETE /v1/files/{file_id}`."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class Health(BaseModel):
    """The response to `GET /health`."""

    status: Literal["ready", "starting", "stopping", "failed"] = Field(description="503 unless it is ready")


def make_id(prefix: str) -> str:
    """Return a new id, which cannot be guessed."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Return the time in seconds since 1970."""
    return int(time.time())


def make_event(message: BaseModel | dict[str, Any]) -> bytes:
    """Return an event of a stream: a message as JSON."""
    if isinstance(message, BaseModel):
        return b"data: " + message.model_dump_json(exclude_unset=True).encode() + b"\n\n"
    return b"data: " + json.dumps(message).encode() + b"\n\n"
