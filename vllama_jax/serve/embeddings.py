"""The route `/v1/embeddings`: ImageBind's vectors of images, videos and audio, which are in one space."""

import base64
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from vllama_jax.branches import BRANCHES
from vllama_jax.embed.outputs import select_outputs
from vllama_jax.errors import ConfigError
from vllama_jax.media_tokens import PreparedMedia
from vllama_jax.model import Model
from vllama_jax.serve.completions import run_until_disconnect
from vllama_jax.serve.conversations import MediaReference, read_parts
from vllama_jax.serve.errors import CLIENT_CLOSED, ApiError
from vllama_jax.serve.protocol import EmbeddingRequest, MediaPart, TextPart
from vllama_jax.serve.responses import Details, Embedding, EmbeddingList, Usage
from vllama_jax.serve.service import Service
from vllama_jax.sharding import get_mesh, use_mesh

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax

    from vllama_jax.nn.video_llama import VideoLlama

_TEXT = "text has no vector, because ImageBind's text encoder is not part of the model; give images, videos or audio"


async def create_embeddings(service: Service, body: EmbeddingRequest, request: Request) -> Response:
    """Compute a vector of norm 1 for each media file of a request.

    That of a video is the mean of the vectors of its frames; its audio is not used. That of audio is the mean of the
    vectors of its clips.
    """
    service.check(body)
    references = _read_references(body)
    try:
        select_outputs(service.model.config, ("imagebind",))
    except ConfigError as error:
        raise ApiError(404, "the model has no ImageBind, so there are no embeddings", code="model_not_found") from error
    encode = _get_encoder(service.model)
    with service.limits.reserve(answers=1):
        media = await run_until_disconnect(request, service.media.read(references, request.state.owner, encode))
    if media is None:
        return Response(status_code=CLIENT_CLOSED)
    vectors = [one.encoded.arrays[0] for one in media]
    as_base64 = body.encoding_format == "base64"
    result = EmbeddingList(
        object="list",
        data=[
            Embedding(object="embedding", index=index, embedding=_format_vector(vector, as_base64=as_base64))
            for index, vector in enumerate(vectors)
        ],
        model=service.name,
        usage=Usage(prompt_tokens=0, total_tokens=0),
        vllama=Details(media=[one.info for one in media]),
    )
    return JSONResponse(result.model_dump(mode="json", exclude_unset=True))


def _read_references(body: EmbeddingRequest) -> Sequence[MediaReference]:
    """Return the files of a request: the content parts of `input`, or of the messages."""
    if (body.input is None) == (body.messages is None):
        raise ApiError(400, "give either input or messages, with content parts of media", param="input")
    places: list[tuple[str, Any]]
    if body.input is not None:
        items = body.input if isinstance(body.input, list) else [body.input]
        places = [(f"input[{index}]", item) for index, item in enumerate(items)]
    else:
        places = []
        for number, message in enumerate(body.messages or ()):
            places += [
                (f"messages[{number}].content[{index}]", item) for index, item in enumerate(message.content or ())
            ]
    parts: list[tuple[str, MediaPart]] = []
    for place, part in places:
        if isinstance(part, str | TextPart):
            raise ApiError(400, f"{place}: {_TEXT}", param=place)
        parts.append((place, part))
    if not parts:
        raise ApiError(400, "input: it is empty; give content parts of media", param="input")
    return read_parts(parts, body)


@functools.lru_cache(maxsize=4)
def _get_encoder(model: Model) -> "Callable[[PreparedMedia], Sequence[np.ndarray]]":
    """Return the function that computes the vector of a file with a model."""

    def encode(prepared: PreparedMedia) -> Sequence[np.ndarray]:
        name = "mel" if prepared.frames is None else "frames"
        with use_mesh(get_mesh(model.network)):
            rows = np.asarray(_compile(name)(model.network, prepared.arrays[name][None])[0], np.float32)
        mean = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).mean(axis=0)
        return [mean / np.linalg.norm(mean)]

    return encode


@functools.cache
def _compile(array: str) -> "Callable[[VideoLlama, np.ndarray], jax.Array]":
    """Compile ImageBind's encoder of frames [1, t, h, w, 3] or of spectrograms [1, s, f, m] to vectors [1, n, e]."""
    import jax

    return jax.jit(BRANCHES["audio"].encoders[array].encode)


def _format_vector(vector: np.ndarray, *, as_base64: bool) -> list[float] | str:
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
