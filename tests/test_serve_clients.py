"""Clients of `vllama serve`: curl, the package openai, LiteLLM, what lmms-eval sends, and schemathesis."""

import asyncio
import json
import shutil
import subprocess

import httpx
import numpy as np
import openai
import pytest
import schemathesis.checks
from hypothesis import HealthCheck, Phase, given, settings
from serve_fixtures import RunningServer, data_url, part, run_server, user

import vllama_jax as vl
from vllama_jax.checkpoints.shipped import CLIPS, find_clip

CLIP = find_clip("demo")
VIDEO = part("video_url", data_url(CLIP))
ANSWER = "a large yellow bell moves to the left"
HEADERS = {"Authorization": "Bearer secret"}
EXAMPLES = 12  # of each route
CHECKS = ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
REQUEST = {"model": "miniature", "messages": [user(VIDEO, "Describe it.")]}

pytestmark = pytest.mark.slow  # tests/test_serve.py has the fast ones


@pytest.fixture(scope="module")
def server():
    with run_server(vl.load("miniature"), keys=("secret",), allow_files=CLIPS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret")


def test_openai_waits_and_tries_again_when_the_server_is_full(server: RunningServer, client: openai.OpenAI):
    """Its default is two retries, after the time that the header Retry-After says."""
    limits, options, statuses = server.service.limits, server.service.options, []
    held = options.rows + options.max_waiting

    def note(response: httpx.Response) -> None:
        statuses.append(response.status_code)
        if response.status_code == 429:
            limits.give_back(answers=held)

    limits.take(answers=held)
    recorded = client.with_options(http_client=httpx.Client(event_hooks={"response": [note]}))
    assert recorded.chat.completions.create(**REQUEST).choices[0].message.content == ANSWER
    assert statuses == [429, 200]


def test_the_stream_helpers_of_openai(server: RunningServer, client: openai.OpenAI):
    with client.chat.completions.stream(**REQUEST, stream_options={"include_usage": True}) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == ANSWER
    assert final.choices[0].finish_reason == "stop"
    assert final.usage.completion_tokens > 0

    async def ask() -> str:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret")
        async with client, client.chat.completions.stream(**REQUEST) as stream:
            return (await stream.get_final_completion()).choices[0].message.content

    assert asyncio.run(ask()) == ANSWER
    image = part("image_url", data_url(CLIPS / "birds.jpg"))
    (embedding,) = client.embeddings.create(model="miniature", input=[image]).data  # the package asks for base64
    assert np.linalg.norm(embedding.embedding) == pytest.approx(1, abs=1e-5)


def test_curl(server: RunningServer, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")

    def curl(*arguments: str) -> str:
        command = ["curl", "--silent", "--show-error", "--max-time", "60", "-H", "Authorization: Bearer secret"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    uploaded = json.loads(curl("--form", f"file=@{CLIP}", "--form", "purpose=user_data", f"{server.url}/v1/files"))
    asked = {"messages": [user({"type": "file", "file": {"file_id": uploaded["id"]}}, "Describe it.")]}
    (tmp_path / "body.json").write_text(json.dumps(asked))
    body = ("--json", f"@{tmp_path / 'body.json'}", f"{server.url}/v1/chat/completions")
    assert json.loads(curl(*body))["choices"][0]["message"]["content"] == ANSWER
    (tmp_path / "body.json").write_text(json.dumps(asked | {"stream": True}))
    events = [line[6:] for line in curl("--no-buffer", *body).splitlines() if line]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert "".join(pieces) == ANSWER
    assert json.loads(curl("-X", "DELETE", f"{server.url}/v1/files/{uploaded['id']}"))["deleted"]
    (tmp_path / "body.json").write_text("{")
    assert json.loads(curl(*body))["error"]["code"] == "invalid_request"


def test_litellm(server: RunningServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it downloads a list of prices
    litellm = pytest.importorskip("litellm", reason="LiteLLM is not installed")
    request = REQUEST | {"model": "openai/miniature", "api_base": f"{server.url}/v1", "api_key": "secret"}
    assert litellm.completion(**request).choices[0].message.content == ANSWER
    chunks = list(litellm.completion(**request, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert asyncio.run(litellm.acompletion(**request)).choices[0].message.content == ANSWER
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**request | {"api_key": "wrong"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**request, max_tokens=10_000)


def test_requests_of_lmms_eval(client: openai.OpenAI):
    """As lmms_eval/models/chat/openai.py of lmms-eval 0.7.3 makes them, with `pass_video_url` and without it.

    examples/serving/lmms_eval.md runs lmms-eval itself.
    """
    common = {"model": "miniature", "max_tokens": 16, "temperature": 0, "top_p": 1.0}
    question = {"type": "text", "text": "Describe it."}
    local = {"type": "video_url", "video_url": {"url": f"file://{CLIP}"}}
    extra = {"media_io_kwargs": {"video": {"num_frames": 8}}}
    messages = [{"role": "user", "content": [local, question]}]
    completion = client.chat.completions.create(messages=messages, extra_body=extra, **common)
    assert completion.choices[0].message.content == ANSWER
    assert completion.vllama["media"][0]["audio"] == "used"
    image = part("image_url", data_url(CLIPS / "birds.jpg"))
    messages = [{"role": "user", "content": [image, image, question]}]
    completion = client.chat.completions.create(messages=messages, **common)
    assert [media["kind"] for media in completion.vllama["media"]] == ["image", "image"]
    assert completion.usage.prompt_tokens > 0


def call_route(route: schemathesis.schemas.APIOperation, mode: schemathesis.GenerationMode, checks: list) -> set[int]:
    """Send requests to a route, and return the statuses."""
    statuses = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(case=route.as_strategy(generation_mode=mode))
    def call(case: schemathesis.Case) -> None:
        if mode is schemathesis.GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = "miniature"  # other names are refused first
        response = case.call(headers=HEADERS, timeout=60)
        statuses.add(response.status_code)
        assert response.status_code < 500, response.text
        case.validate_response(response, checks=checks)

    call()
    return statuses


@pytest.mark.parametrize("mode", [*schemathesis.GenerationMode], ids=lambda mode: mode.value)
def test_responses_fit_the_schema(server: RunningServer, mode: schemathesis.GenerationMode):
    """Requests that schemathesis makes from the OpenAPI schema, valid and not: none is an error of the server."""
    schemathesis.checks.load_all_checks()
    checks = schemathesis.checks.CHECKS.get_by_names(CHECKS)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=HEADERS)
    routes = [result.ok() for result in schema.get_all_operations()]
    if mode is schemathesis.GenerationMode.NEGATIVE:  # other routes accept every text
        routes = [route for route in routes if "application/json" in [body.media_type for body in route.body]]
    statuses = {route.label: call_route(route, mode, checks) for route in routes}
    assert statuses["POST /v1/chat/completions"] == (
        {200, 400} if mode is schemathesis.GenerationMode.POSITIVE else {400}
    )
    assert server.service.status == "ready"
