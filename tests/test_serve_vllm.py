"""`vllama serve --engine`: a vLLM server decodes the prompts; answers equal those of the model's own engine."""

import contextlib
import io
import json
import sys
import time

import httpx
import jax
import numpy as np
import pytest
import torch
from cli_fixtures import expect_error_line as expect_error
from flax import nnx
from serve_fixtures import RunningServer, data_url, part, run_server, user
from vllm_double import VllmDouble, run_double

import vllama_jax as vl
from vllama_jax.checkpoints.shipped import CLIPS, find_clip
from vllama_jax.convert.write_tensors import dump_tensor
from vllama_jax.errors import ConfigError
from vllama_jax.serve import vllm_engine
from vllama_jax.serve.options import ServeOptions

VIDEO = part("video_url", data_url(find_clip("demo")))
IMAGE = part("image_url", data_url(CLIPS / "birds.jpg"))
SAMPLED = {"temperature": 1.5, "top_p": 1.0, "seed": 7, "n": 3, "max_tokens": 12}


@pytest.fixture(scope="module")
def local():
    with run_server(vl.load("miniature")) as running:
        yield running


@pytest.fixture(scope="module")
def double(local):
    double = VllmDouble(local.service.scheduler, local.service.model.config.llama.width)
    with contextlib.ExitStack() as running:
        double.url, double.stop = running.enter_context(run_double(double)), running.close
        yield double


@pytest.fixture(scope="module")
def embedder() -> vl.Model:
    """The model without the layers of its language model."""
    return vl.load("miniature", llama_layers=False)


@pytest.fixture(scope="module")
def remote(double, embedder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "POLL_SECONDS", 0.05)
        with run_server(embedder, engine=f"{double.url}/v1/") as running:
            yield running


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def get_health(server: RunningServer) -> tuple[int, str]:
    response = httpx.get(f"{server.url}/health")
    return response.status_code, response.json()["status"]


def ask_both(local: RunningServer, remote: RunningServer, *parts, **fields) -> list:
    """Return the choices of a request, which both servers answer in the same way."""
    found, expected = (server.ask(*parts, **fields) for server in (remote, local))
    for one in (found, expected):  # the local engine reuses prompts, and computes in other batches
        del one["usage"]["prompt_tokens_details"]
        for choice in one["choices"]:
            _round(choice)
    assert found["usage"] == expected["usage"]
    assert found["choices"] == expected["choices"]
    return found["choices"]


def _round(value) -> None:
    for key in value if isinstance(value, dict) else range(len(value)):
        if isinstance(value[key], float):
            value[key] = round(value[key], 3)
        elif isinstance(value[key], (dict, list)):
            _round(value[key])


def test_tensors_are_those_of_torch_save(monkeypatch):
    values = {dtype: np.arange(6).reshape(3, 2).astype(dtype) for dtype in ("float32", "bfloat16", "float16")}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        files = {dtype: dump_tensor(array) for dtype, array in values.items()}
    for dtype, file in files.items():
        tensor = torch.load(io.BytesIO(file), weights_only=True)
        assert tensor.dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(tensor.float().numpy(), values[dtype].astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_layers_of_the_language_model_are_not_loaded(local, quantize):
    llama = vl.load("miniature", llama_layers=False, quantize=quantize).network.llama
    (embedding,) = jax.tree.leaves(nnx.state(llama))
    np.testing.assert_array_equal(embedding, local.service.model.network.llama.embedding[...])


@pytest.mark.slow
def test_answers_equal_those_of_the_models_own_engine(local, remote, double):
    before = len(double.embeddings)
    (choice,) = ask_both(local, remote, VIDEO, "Describe it.")
    assert choice["message"]["content"] == "a large yellow bell moves to the left"
    assert choice["finish_reason"] == "stop"
    ask_both(local, remote, VIDEO, IMAGE, "What do you hear?", max_tokens=3, repetition_penalty=1.3)
    ask_both(local, remote, "Hello?", min_tokens=8, max_tokens=12)
    assert [one["message"]["content"] for one in ask_both(local, remote, VIDEO, "Describe it.", stop="low bell")] == [
        "a large yel"
    ]
    ask_both(local, remote, VIDEO, "Describe it.", logprobs=True, top_logprobs=3, stop=["moves", "unused"])
    texts = [choice["message"]["content"] for choice in ask_both(local, remote, VIDEO, "Describe it.", **SAMPLED)]
    assert len(set(texts)) > 1
    width = local.service.model.config.llama.width
    assert {one.dtype for one in double.embeddings} == {torch.float32}
    assert {one.shape[1] for one in double.embeddings} == {width}
    assert len(double.embeddings) == before + 8
    assert sorted(options["seed"] for options in double.options[-3:]) == [7, 8, 9]
    remote.ask("Hello?", temperature=1.0, seed=2**64 - 1, max_tokens=2)  # not an int64


@pytest.mark.slow
def test_a_conversation_and_a_stream(local, remote):
    messages = [user(VIDEO, "Describe it.")]
    for question in ("Which way does it go?", "What do you hear?"):
        answers = [server.post({"messages": messages}).json() for server in (remote, local)]
        found, expected = (answer["choices"][0]["message"]["content"] for answer in answers)
        assert found == expected
        messages += [{"role": "assistant", "content": found}, user(question)]
    body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
    lines = [line for line in remote.post(body).text.split("\n\n") if line]
    *events, usage = (json.loads(line.removeprefix("data: ")) for line in lines[:-1])
    whole = local.post({"messages": messages}).json()
    assert (
        "".join(one["choices"][0]["delta"].get("content", "") for one in events)
        == (whole["choices"][0]["message"]["content"])
    )
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


@pytest.mark.slow
def test_what_vllm_cannot_do_is_refused(remote, double, monkeypatch):
    def refuse(status: int, **fields) -> str:
        response = remote.post({"messages": [user("Hello?")], "max_tokens": 4} | fields)
        assert response.status_code == status, response.text
        return response.json()["error"]["message"]

    before = len(double.options)
    assert "has no such option" in refuse(400, no_repeat_ngram_size=2)
    assert "allows at most 2, not 3" in refuse(400, temperature=3)
    conversation = {"messages": [user("Hello?"), {"role": "assistant", "content": "Hi."}]}
    assert httpx.post(f"{remote.url}/page/attention", json=conversation).status_code == 400  # of the page
    assert len(double.options) == before
    monkeypatch.setattr(double, "max_model_len", 12)
    message = "the vLLM server that answers refuses the request: This model's maximum context length is 12 tokens."
    assert refuse(400) == message
    streamed = remote.post({"messages": [user("Hello?")], "max_tokens": 4, "stream": True}).text.split("\n\n")
    assert json.loads(streamed[-3].removeprefix("data: "))["error"]["message"] == message
    assert streamed[-2] == "data: [DONE]"
    monkeypatch.setattr(double, "failure", 500)
    assert "try again" in refuse(503)


@pytest.mark.slow
def test_a_client_that_leaves_cancels_its_answer(remote, double, local, monkeypatch):
    engine, before = local.service.scheduler._engine, double.num_cancelled
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.1) or step())
    request = {"messages": [user("Hello?")], "max_tokens": 64, "min_tokens": 64, "temperature": 2.0, "n": 2}
    with httpx.stream("POST", f"{remote.url}/v1/chat/completions", json=request | {"stream": True}) as response:
        received = response.iter_bytes()  # httpx closes the connection with this iterator
        next(received)
        wait_until(lambda: double.num_open == 2)
    wait_until(lambda: double.num_cancelled == before + 2)
    wait_until(lambda: not engine.is_busy)
    assert remote.service.limits.used("answers") == 0
    assert remote.service.scheduler.num_running == remote.service.scheduler.num_waiting == 0


@pytest.mark.slow
def test_a_server_that_cannot_be_used_is_one_line(double, local, monkeypatch):
    def expect(*arguments: object) -> str:
        return expect_error("serve", "--port", "0", "--engine", *arguments)

    assert "the vLLM server cannot be reached" in expect("http://127.0.0.1:1")
    monkeypatch.setattr(double, "max_model_len", 512)
    assert "at most 512 tokens, but 1024 are needed; set vLLM's --max-model-len" in expect(double.url)
    monkeypatch.setattr(double, "max_model_len", 2048)
    assert "a prompt of embeddings is refused" in expect(local.url, "--prompt-tokens", 256, "--new-tokens", 64)
    monkeypatch.setattr(double, "enable_prompt_embeds", False)
    assert "start vLLM with --enable-prompt-embeds" in expect(double.url)
    monkeypatch.setattr(double, "key", "secret")
    monkeypatch.setenv("VLLAMA_ENGINE_API_KEY", "other")
    assert "set VLLAMA_ENGINE_API_KEY to its API key" in expect(double.url)
    monkeypatch.setattr(double, "enable_prompt_embeds", True)
    monkeypatch.setenv("VLLAMA_ENGINE_API_KEY", "secret")
    needed = vllm_engine.make_requirements(local.service.model.config.llama, "float32", 1024)
    vllm_engine.require_server(double.url, needed)
    for invalid in (
        "localhost:8000",
        "http://host:port",
        "http://",
        "http://[::1",
        "http://a:b@host",
        "https://host/?a",
    ):
        with pytest.raises(ConfigError, match="http://host:8000"):
            ServeOptions(engine=invalid)


@pytest.mark.slow
def test_requests_wait_for_a_server_that_is_gone(local, remote, double, monkeypatch):
    wait_until(lambda: get_health(remote) == (200, "ready"))
    engine = local.service.scheduler._engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.1) or step())
    request = {"messages": [user("Hello?")], "max_tokens": 64, "min_tokens": 64, "temperature": 2.0, "stream": True}
    with httpx.stream("POST", f"{remote.url}/v1/chat/completions", json=request) as stream:
        lines = stream.iter_lines()
        next(lines)
        wait_until(lambda: double.num_open == 1)
        double.stop()
        rest = [line for line in lines if line]
    assert "is not available" in json.loads(rest[-2].removeprefix("data: "))["error"]["message"]
    wait_until(lambda: get_health(remote) == (503, "unavailable"))
    refused = remote.post({"messages": [user("Hello?")]})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert "is not available" in refused.text
    with run_double(double, port=httpx.URL(double.url).port):
        wait_until(lambda: get_health(remote) == (200, "ready"))
        assert remote.ask("Hello?", max_tokens=2)["usage"]["completion_tokens"] == 2
        double.failure = 503
        wait_until(lambda: get_health(remote) == (503, "unavailable"))
