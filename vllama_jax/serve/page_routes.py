"""The page of the server at `/`, and the routes that only it uses."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles

from vllama_jax.checkpoints.shipped import CLIPS
from vllama_jax.config import GREEDY
from vllama_jax.errors import ContextLengthError
from vllama_jax.media_tokens import PreparedMedia
from vllama_jax.serve.answer_attention import find_attended_media, read_shares
from vllama_jax.serve.conversations import read_dialog, read_parts
from vllama_jax.serve.errors import ApiError
from vllama_jax.serve.preview import describe_media
from vllama_jax.serve.protocol import ChatRequest, FilePart, FileReference, MediaFields
from vllama_jax.serve.service import Service

PAGE = Path(__file__).with_name("page")  # its static files
EXAMPLES = (  # clips of the package, and questions that the miniature answers
    ("bell.mp4", "A bell moves and rings", "Which way does it go?"),
    ("two.mp4", "One object, then another", "Describe it."),
    ("dog_or_drum.mp4", "What is seen, and what is heard", "What do you hear?"),
    ("birds.jpg", "An image", "What is in the image?"),
)
# Everything that the page loads is its own, except what it shows of files, which are data: and blob: URLs.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PreviewRequest(MediaFields):
    """An uploaded file, and how it is sampled."""

    file_id: str


class _PageFiles(StaticFiles):
    """The static files of the page."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update({**_HEADERS, "Cache-Control": "no-cache"})
        return response


def add_page(app: FastAPI, service: Service) -> None:
    """Add the page and its routes to an app, which has all other routes already."""
    _add_overview(app, service)
    _add_views(app, service)
    app.mount("/", _PageFiles(directory=PAGE, html=True), name="page")


def _add_overview(app: FastAPI, service: Service) -> None:
    @app.get("/page/overview", include_in_schema=False)
    async def overview() -> dict[str, Any]:
        """Describe the model, its limits and the examples."""
        config, name = service.model.config, service.name
        listens = "sees and hears" if config.has_audio else "sees"
        return {
            "description": f"{name} {listens}; {config.num_frames} frames of a video unless set",
            "num_frames": config.num_frames,
            "max_frames": min(config.num_frame_positions, service.options.max_frames),
            "max_tokens": min(GREEDY.max_new_tokens, service.options.new_tokens),
            "has_audio": config.has_audio,
            "has_attention": service.options.engine is None,  # else LLaMA's layers are not loaded
            "examples": [
                {"file": file, "title": title, "question": question}
                for file, title, question in EXAMPLES
                if (CLIPS / file).is_file()
            ],
        }

    @app.get("/page/examples/{name}", include_in_schema=False)
    async def example(name: str) -> Response:
        """Return an example's clip."""
        if name not in {file for file, *_ in EXAMPLES} or not (CLIPS / name).is_file():
            raise ApiError(404, "there is no such example")
        return FileResponse(CLIPS / name)


def _add_views(app: FastAPI, service: Service) -> None:
    one_at_a_time = asyncio.Lock()  # for attention, which takes a forward pass of the language model

    def describe(prepared: PreparedMedia) -> Sequence[np.ndarray]:
        """Return a preview as the bytes of its JSON, which the cache of encoded media keeps."""
        return [np.frombuffer(json.dumps(describe_media(prepared, service.model.config)).encode(), np.uint8)]

    def share(prepared: PreparedMedia) -> Sequence[np.ndarray]:
        return read_shares(service.model.network, prepared)

    @app.post("/page/preview", include_in_schema=False)
    async def preview(body: PreviewRequest, request: Request) -> Response:
        """Return what the model takes of an uploaded file."""
        file = FilePart(type="file", file=FileReference(file_id=body.file_id))
        read = await service.media.read(read_parts([("file", file)], body), request.state.owner, describe)
        return Response(read[0].encoded.arrays[0].tobytes(), media_type="application/json")

    @app.post("/page/attention", include_in_schema=False)
    async def find_attention(body: ChatRequest, request: Request) -> Response:
        """Return which frames and audio clips the tokens of the last answer read."""
        service.check(body)
        if service.options.engine is not None:
            raise ApiError(400, "attention needs LLaMA's layers, which a server with --engine does not load")
        dialog = read_dialog(body.model_copy(update={"continue_final_message": True}))
        media = await service.media.read(dialog.media, request.state.owner)
        shares = await service.media.read(dialog.media, request.state.owner, share)
        conversation = service.requests.build_conversation(dialog, media)
        arrays, read = ([one.encoded.arrays for one in found] for found in (media, shares))
        arguments = service.model, conversation, arrays, read, dialog.answer_start
        try:
            async with one_at_a_time:
                found = await asyncio.to_thread(find_attended_media, *arguments)
        except ContextLengthError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from error
        return JSONResponse({"tokens": found})
