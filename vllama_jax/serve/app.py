"""The app of the server: its routes, and what they are described as in `/openapi.json`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response

import vllama_jax
from vllama_jax.serve.completions import create_chat_completion, create_completion
from vllama_jax.serve.embeddings import create_embeddings
from vllama_jax.serve.errors import ApiError, add_error_handlers, log_failure
from vllama_jax.serve.gate import UPLOAD_ROUTE, Gate
from vllama_jax.serve.metrics import CONTENT_TYPE
from vllama_jax.serve.page_routes import add_page
from vllama_jax.serve.protocol import ChatRequest, CompletionRequest, EmbeddingRequest
from vllama_jax.serve.responses import (
    ChatCompletion,
    Completion,
    DeletedFile,
    EmbeddingList,
    ErrorResponse,
    FileInfo,
    FileList,
    Health,
    ModelInfo,
    ModelList,
)
from vllama_jax.serve.service import Service

EXPIRY_SECONDS = 60.0  # between two searches for expired files
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)
}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string"},
                    },
                }
            }
        },
    }
}


def make_app(service: Service) -> FastAPI:
    """Make the app of a service. It starts the service when it starts, and closes it when it ends.

    Args:
        service: The service.

    Example:
        >>> service = make_service(vl.load("miniature"), "miniature", ServeOptions(), keys=())  # doctest: +SKIP
        >>> uvicorn.run(make_app(service))  # doctest: +SKIP
    """

    @asynccontextmanager
    async def run_service(app: FastAPI) -> AsyncIterator[None]:
        try:
            await asyncio.to_thread(service.start)
        except Exception as error:  # the server ends
            log_failure(error)
            raise
        expiry = asyncio.ensure_future(_remove_expired_files(service))
        try:
            yield
        finally:
            expiry.cancel()
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title="vllama_jax",
        version=vllama_jax.__version__,
        description="Video-LLaMA with the API of OpenAI and vLLM; see docs/serving.md.",
        lifespan=run_service,
        docs_url=None,  # FastAPI's pages load scripts from other hosts
        redoc_url=None,
        responses=_ERRORS,
    )
    add_error_handlers(app)
    _add_generation_routes(app, service)
    _add_file_routes(app, service)
    _add_state_routes(app, service)
    add_page(app, service)
    gate = {"options": service.options, "keys": service.keys, "limits": service.limits, "metrics": service.metrics}
    app.add_middleware(Gate, **gate)  # type: ignore[arg-type]
    if service.options.allow_origins:
        origins = list(service.options.allow_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAM)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation about media files, in one response or as a stream of events."""
        return await create_chat_completion(service, body, request)

    @app.post("/v1/completions", response_model=Completion, responses=_STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text, without a prompt template and without media."""
        return await create_completion(service, body, request)

    @app.post("/v1/embeddings", response_model=EmbeddingList)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Compute ImageBind's vectors of images, videos and audio."""
        return await create_embeddings(service, body, request)


def _add_file_routes(app: FastAPI, service: Service) -> None:
    @app.post(UPLOAD_ROUTE, response_model=FileInfo, openapi_extra=_FORM)
    async def upload_file(request: Request) -> FileInfo:
        """Upload a media file, for content parts of the type `file`."""
        content_type = request.headers.get("content-type", "")
        return await service.uploads.receive(content_type, request.stream(), request.state.owner)

    @app.get(UPLOAD_ROUTE, response_model=FileList)
    async def list_files(request: Request) -> FileList:
        """List the uploaded files of this API key, the newest first."""
        return FileList(data=service.uploads.list(request.state.owner))

    @app.get(UPLOAD_ROUTE + "/{file_id}", response_model=FileInfo)
    async def get_file(file_id: str, request: Request) -> FileInfo:
        """Describe an uploaded file."""
        return service.uploads.get(file_id, request.state.owner)

    @app.delete(UPLOAD_ROUTE + "/{file_id}", response_model=DeletedFile)
    async def delete_file(file_id: str, request: Request) -> DeletedFile:
        """Remove an uploaded file."""
        service.uploads.delete(file_id, request.state.owner)
        return DeletedFile(id=file_id)


def _add_state_routes(app: FastAPI, service: Service) -> None:
    described = ModelInfo(
        id=service.name,
        created=service.created,
        max_model_len=min(service.options.max_request_tokens, service.model.network.llama.cfg.max_length),
    )

    @app.get("/v1/models", response_model=ModelList)
    async def list_models() -> ModelList:
        """List the model of the server."""
        return ModelList(data=[described])

    @app.get("/v1/models/{model:path}", response_model=ModelInfo)
    async def get_model(model: str) -> ModelInfo:
        """Describe the model of the server."""
        if model != service.name:
            raise ApiError(404, f"model: there is no such model; the model of this server is {service.name!r}")
        return described

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> JSONResponse:
        """Report whether requests are answered: 200 if the server is ready, else 503."""
        status = service.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Report metrics in Prometheus' text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)


async def _remove_expired_files(service: Service) -> None:
    while True:
        await asyncio.sleep(EXPIRY_SECONDS)
        service.uploads.remove_expired()
