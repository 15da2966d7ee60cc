"""The protocol of a vLLM server that decodes prompts of embeddings: what is sent, and what is read of its answers.

vLLM's route `/v1/completions` takes a prompt as `prompt_embeds`: a file of torch.save in base64, with the embeddings
[n, width] of text and media. It applies no prompt template. `vllm serve` needs the option --enable-prompt-embeds.
"""

import base64
import contextlib
import dataclasses
import json
import logging
import os
import textwrap
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, Literal

import httpx
import numpy as np
from jaxtyping import Float

from vllama_jax.config import GenerationConfig
from vllama_jax.convert.write_tensors import dump_tensor
from vllama_jax.errors import VllamaError, format_error
from vllama_jax.serve.errors import ApiError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "VLLAMA_ENGINE_API_KEY"
MAX_TEMPERATURE = 2.0  # of vLLM
RETRY_SECONDS = 5  # after which a client may try again
_TIMEOUT = httpx.Timeout(10.0)  # seconds; of everything but the answers
_PROBE_TIMEOUT = httpx.Timeout(10.0, read=120.0)  # the probe waits behind other requests
_MAX_MESSAGE = 300  # characters
_TOKEN_ID = "token_id:"  # before the id of a token in log-probabilities


class EngineError(VllamaError):
    """A vLLM server that cannot be reached, or cannot answer the prompts of the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a vLLM server must be able to answer.

    Attributes:
        width: The width of the language model.
        dtype: The dtype of the embeddings.
        tokens: The largest number of tokens of a prompt and its answer.
    """

    width: int
    dtype: np.dtype
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of an answer.

    Attributes:
        tokens: Its tokens.
        logprobs: Their log-probabilities.
        top_logprobs: The most probable tokens at their positions, if the request asks.
        finish_reason: Why the answer ended; None if it goes on.
    """

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    finish_reason: Literal["stop", "length"] | None


def make_client(address: str) -> httpx.AsyncClient:
    """Return a client of a server, with the API key of the environment variable VLLAMA_ENGINE_API_KEY if it is set.

    Args:
        address: The URL before `/v1`.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)  # the server of this process limits its requests
    return httpx.AsyncClient(base_url=address, headers=headers, timeout=_TIMEOUT, limits=limits)


def check_config(config: GenerationConfig) -> None:
    """Raise ApiError with status 400 for an option of decoding that vLLM does not have."""
    if config.no_repeat_ngram_size:
        why = "no_repeat_ngram_size: the vLLM server that answers has no such option; omit it"
        raise ApiError(400, why, param="no_repeat_ngram_size")
    if config.temperature > MAX_TEMPERATURE:
        why = (
            f"temperature: the vLLM server that answers allows at most {MAX_TEMPERATURE:g}, not {config.temperature:g}"
        )
        raise ApiError(400, why, param="temperature")


def make_body(
    model: str, embeddings: Float[np.ndarray, "n w"], config: GenerationConfig, end_tokens: Sequence[int]
) -> bytes:
    """Return the body of a request: a stream with the ids and the log-probabilities of tokens.

    Args:
        model: The model's name on the server.
        embeddings: The embeddings of the prompt.
        config: The options of decoding.
        end_tokens: The tokens that end the answer.
    """
    fields: dict[str, Any] = {
        "model": model,
        "prompt_embeds": base64.b64encode(dump_tensor(embeddings)).decode(),
        "max_tokens": config.max_new_tokens,
        "min_tokens": config.min_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.seed % 2**63,  # vLLM's seeds are signed
        "repetition_penalty": config.repetition_penalty,
        "stop_token_ids": sorted(end_tokens),
        "logprobs": config.top_logprobs,  # 0 for those of the chosen tokens
        "return_tokens_as_token_ids": True,  # in the log-probabilities
        "return_token_ids": True,
        "stream": True,
    }
    return json.dumps(fields).encode()


async def stream_chunks(
    client: httpx.AsyncClient, body: bytes, timeout: httpx.Timeout, top_logprobs: int = 0
) -> AsyncGenerator[Chunk]:
    """Yield the chunks of an answer. Closing the generator closes the connection, which cancels the answer.

    Args:
        client: A client of the server.
        body: The body of the request, from `make_body`.
        timeout: Its timeouts.
        top_logprobs: The number of most probable tokens that it asks for.

    Raises:
        ApiError: The server refuses this request or fails to answer it.
        EngineError: The server cannot be reached, or does not answer as vLLM does.
    """
    headers = {"Content-Type": "application/json"}
    with _explain_errors(client):
        async with client.stream("POST", "/v1/completions", content=body, headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                await response.aread()
                raise _make_error(response.status_code, _read_message(response.text), client)
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                if data == line.strip() or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise _make_error(int(event["error"].get("code") or 500), _read_message(data), client)
                for choice in event["choices"]:
                    yield _read_choice(choice, top_logprobs)


async def check_server(client: httpx.AsyncClient, needed: Requirements) -> str:
    """Check that a server can answer the prompts of a model, also with a prompt of one token.

    Args:
        client: A client of the server.
        needed: What it must be able to answer.

    Returns:
        The model's name on the server.

    Raises:
        EngineError: It cannot be reached, or cannot answer them.
    """
    address = str(client.base_url).rstrip("/")
    with _explain_errors(client):
        response = await client.get("/v1/models")
        if response.status_code != 200:
            raise _make_unavailable(response.status_code, _read_message(response.text), client)
        model = response.json()["data"][0]
        name, limit = str(model["id"]), model.get("max_model_len")
    if limit is not None and limit < needed.tokens:
        why = f"its prompts and answers have at most {limit} tokens, but {needed.tokens} are needed"
        advice = "set vLLM's --max-model-len, or lower --prompt-tokens and --new-tokens"
        raise EngineError(f"{address}: {why}; {advice}")
    embeddings = np.zeros((1, needed.width), needed.dtype)
    body = make_body(name, embeddings, GenerationConfig(max_new_tokens=1), ())
    try:
        async for _ in stream_chunks(client, body, _PROBE_TIMEOUT):
            pass
    except ApiError as error:
        advice = "start vLLM with --enable-prompt-embeds, on the exported language model of this model"
        raise EngineError(f"{address}: a prompt of embeddings is refused ({error.detail}); {advice}") from error
    return name


@contextlib.contextmanager
def _explain_errors(client: httpx.AsyncClient) -> Iterator[None]:
    """Raise EngineError for a server that cannot be reached, or whose responses are not those of vLLM."""
    address = str(client.base_url).rstrip("/")
    try:
        yield
    except httpx.HTTPError as error:
        why = textwrap.shorten(format_error(error), _MAX_MESSAGE, placeholder=" …")
        raise EngineError(
            f"{address}: the vLLM server cannot be reached ({why}); start it, or check --engine"
        ) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        why = "its responses are not those of a vLLM server with prompts of embeddings and token ids"
        raise EngineError(f"{address}: {why}; check --engine, or update vLLM") from error


def _read_choice(choice: dict[str, Any], top_logprobs: int) -> Chunk:
    """Return a chunk of the choice of an event. Raises an exception of `_explain_errors` if it has another format."""
    logprobs, tokens = choice["logprobs"], [int(token) for token in choice["token_ids"]]
    values = [float(value) for value in logprobs["token_logprobs"]]
    reason = choice.get("finish_reason")
    if reason not in (None, "stop", "length"):  # such as "abort", of a server that is stopped
        raise ApiError(503, "the vLLM server ended the answer; try again", retry_after=RETRY_SECONDS)
    if len(values) != len(tokens):
        raise ValueError(values)
    return Chunk(
        tokens=tokens,
        logprobs=values,
        top_logprobs=[_read_top(found, top_logprobs) for found in logprobs["top_logprobs"]] if top_logprobs else [],
        finish_reason=reason,
    )


def _read_top(found: dict[str, float], count: int) -> list[tuple[int, float]]:
    """Return the most probable tokens. vLLM adds the chosen token, which comes first, if it is not one of them."""
    items = [(int(name.removeprefix(_TOKEN_ID)), float(value)) for name, value in found.items()]
    items = items[1:] if len(items) > count else items
    return sorted(items, key=lambda item: -item[1])


def _read_message(text: str) -> str:
    """Return the message of an error in one line."""
    try:
        found = json.loads(text)
        message = found.get("error", found)
        message = message if isinstance(message, str) else message["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        message = text
    return textwrap.shorten(str(message), _MAX_MESSAGE, placeholder=" …")


def _make_error(status: int, message: str, client: httpx.AsyncClient) -> ApiError | EngineError:
    """Return the error of a request: ApiError if other requests can be answered, else EngineError."""
    if status in (400, 413, 422):
        return ApiError(400, f"the vLLM server that answers refuses the request: {message}")
    if status == 429:
        return ApiError(429, "the vLLM server that answers has too many requests", retry_after=RETRY_SECONDS)
    if status == 500:
        logger.error(f"{client.base_url}: the vLLM server failed to answer a request: {message}")
        return ApiError(503, "the vLLM server failed to answer; try again", retry_after=RETRY_SECONDS)
    return _make_unavailable(status, message, client)


def _make_unavailable(status: int, message: str, client: httpx.AsyncClient) -> EngineError:
    address = str(client.base_url).rstrip("/")
    advice = f"set {KEY_VARIABLE} to its API key" if status in (401, 403) else "check --engine"
    return EngineError(f"{address}: the vLLM server has status {status} ({message or 'no message'}); {advice}")
