"""A double of the vLLM server that `vllama serve --engine` asks: its routes and formats, with our own engine.

It decodes the embeddings that it receives. It refuses what vLLM 0.32 refuses, such as unknown dtypes and widths.
"""

import asyncio
import base64
import contextlib
import io
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import numpy as np
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vllama_jax.config import GenerationConfig
from vllama_jax.generate import EmbeddedPrompt
from vllama_jax.generate import Request as EngineRequest
from vllama_jax.serve.completions import DONE, EventStream
from vllama_jax.serve.options import ServeOptions
from vllama_jax.serve.run import get_url, open_socket
from vllama_jax.serve.scheduler import Scheduler, Update

MODEL = "exported/llama"
# Of vllm/entrypoints/openai/completion/protocol.py, those that a request may have here.
OPTIONS = {"max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed", "repetition_penalty", "stop_token_ids"}
FORMAT = {
    "model",
    "prompt_embeds",
    "logprobs",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "stream",
}


class VllmDouble:
    """The double. Its attributes may be changed while it runs.

    Args:
        scheduler: What decodes.
        width: The width of the language model.

    Attributes:
        scheduler: What decodes.
        embeddings: The tensor of each request.
        options: The options of each request.
        num_cancelled: The number of answers whose connection was closed before their end.
        num_open: The number of answers that go on.
        key: The API key that requests must have.
        max_model_len: The largest number of tokens of a prompt and its answer.
        enable_prompt_embeds: Whether the option of that name is set.
        failure: The status of all responses, 503 or that of a request that fails, 500; None for none.
    """

    def __init__(self, scheduler: Scheduler, width: int):
        self.scheduler, self._width = scheduler, width
        self.embeddings: list[torch.Tensor] = []
        self.options: list[dict[str, Any]] = []
        self.num_cancelled = self.num_open = 0
        self.key: str | None = None
        self.max_model_len = 2048
        self.enable_prompt_embeds = True
        self.failure: int | None = None

    def make_app(self) -> Starlette:
        """Return the app."""
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._list_models),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ]
        )

    async def _health(self, request: Request) -> Response:
        return Response(status_code=503 if self.failure == 503 else 200)

    async def _list_models(self, request: Request) -> Response:
        if refused := self._refuse(request):
            return refused
        model = {"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": self.max_model_len}
        return JSONResponse({"object": "list", "data": [model]})

    def _refuse(self, request: Request) -> Response | None:
        if self.failure:
            return _error(self.failure, "engine error")
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None

    async def _complete(self, request: Request) -> Response:
        if refused := self._refuse(request):
            return refused
        body = await request.json()
        assert {*body} == OPTIONS | FORMAT
        if body["model"] != MODEL:
            return _error(404, f"The model `{body['model']}` does not exist.")
        if not self.enable_prompt_embeds:
            return _error(400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
        data = base64.b64decode(body["prompt_embeds"], validate=True)
        tensor = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        if tensor.dim() != 2 or tensor.shape[1] != self._width:
            return _error(400, f"`prompt_embeds` hidden_size {tensor.shape[-1]} does not match {self._width}.")
        options = {name: body[name] for name in OPTIONS}
        if len(tensor) + options["max_tokens"] > self.max_model_len:
            return _error(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        assert options["temperature"] <= 2
        assert -(2**63) <= options["seed"] < 2**63
        assert body["return_token_ids"] is body["return_tokens_as_token_ids"] is body["stream"] is True
        self.embeddings.append(tensor)
        self.options.append(options)
        return EventStream(self._stream(tensor, options, body["logprobs"]), contextlib.ExitStack())

    async def _stream(self, tensor: torch.Tensor, options: dict[str, Any], logprobs: int) -> AsyncGenerator[bytes]:
        config = GenerationConfig(
            max_new_tokens=options["max_tokens"],
            min_new_tokens=options["min_tokens"],
            top_logprobs=logprobs,
            **{name: options[name] for name in ("temperature", "top_p", "top_k", "seed", "repetition_penalty")},
        )
        count = len(tensor)
        prompt = EmbeddedPrompt(np.zeros(count, np.int32), np.ones(count, bool), tensor.float().numpy())
        stops = [(token,) for token in options["stop_token_ids"]]
        has_ended = False
        self.num_open += 1
        try:
            with self.scheduler.submit([EngineRequest(prompt=prompt, config=config, stops=stops)]) as answers:
                async for update in answers:
                    has_ended = update.finish_reason is not None
                    yield f"data: {json.dumps({'id': 'cmpl-1', 'choices': [_make_choice(update)]})}\n\n".encode()
            yield DONE
        finally:
            self.num_cancelled += not has_ended
            self.num_open -= 1


def _make_choice(update: Update) -> dict[str, Any]:
    tops = update.top_logprobs or [[]] * len(update.tokens)
    return {
        "index": 0,
        "text": "…",
        "logprobs": {
            "text_offset": [0] * len(update.tokens),
            "tokens": [f"token_id:{token}" for token in update.tokens],
            "token_logprobs": update.logprobs,
            "top_logprobs": [
                {f"token_id:{token}": logprob} | {f"token_id:{other}": value for other, value in top}
                for token, logprob, top in zip(update.tokens, update.logprobs, tops, strict=True)
            ],
        },
        "finish_reason": update.finish_reason,
        "stop_reason": None,
        "token_ids": update.tokens,
    }


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "Error", "param": None, "code": status}}, status)


@contextlib.contextmanager
def run_double(double: VllmDouble, port: int = 0) -> Iterator[str]:
    """Run a double until the context ends, which closes all connections. Yields its URL."""
    with open_socket(ServeOptions(port=port)) as opened:
        server = uvicorn.Server(
            uvicorn.Config(double.make_app(), log_config=None, lifespan="off", timeout_graceful_shutdown=0)
        )

        async def serve() -> None:
            await server.serve(sockets=[opened])
            while (
                double.num_open or double.scheduler.num_running
            ):  # the scheduler must not deliver to a loop that is closed
                await asyncio.sleep(0.01)

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            yield get_url(opened)
        finally:
            server.should_exit = True
            thread.join()
