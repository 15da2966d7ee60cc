"""Contents of requests to a judge, and which requests are retried."""

import sys

import eval_fixtures
import pytest
from eval_fixtures import make_completion

import vllama_jax as vl
from vllama_jax.evaluate.judge_client import MAX_RETRIES, Judge, JudgeError


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Record the seconds between requests, without waiting."""
    found: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", found.append)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return found


def ask(url: str, **fields) -> dict:
    return Judge(url, "fake", timeout=5, **fields).ask("detail", ["q"], "r", ["a"])


def test_failed_requests_are_sent_again_after_growing_waits(waits):
    with eval_fixtures.serve_judge(lambda number, body: (503, {})) as fake, pytest.raises(JudgeError, match="HTTP 503"):
        ask(fake.url)
    assert len(fake.bodies) == 1 + MAX_RETRIES
    growing = [0.5 * 2**number for number in range(MAX_RETRIES)]
    assert all(0.7 * most <= wait <= most for wait, most in zip(waits, growing, strict=True)), waits


def test_the_retry_after_header_is_respected(waits):
    def reply(number, body):
        return (429, {}, {"Retry-After": "37"}) if number < 2 else make_completion('{"score": 1}')

    with eval_fixtures.serve_judge(reply) as fake:
        assert ask(fake.url)["score"] == 1
    assert waits == [37, 37]


def test_an_invalid_request_is_sent_once(waits):
    with eval_fixtures.serve_judge(lambda number, body: (404, {})) as fake, pytest.raises(JudgeError, match="refused"):
        ask(fake.url)
    assert (len(fake.bodies), waits) == (1, [])


def test_without_a_key_no_authorization_is_sent(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, f"secret-{name}")
    with eval_fixtures.serve_judge(lambda number, body: make_completion('{"score": 1}')) as fake:
        ask(fake.url)
        ask(fake.url, key="sk-mine")
    without, with_key = fake.headers
    assert "Authorization" not in without
    assert with_key["Authorization"] == "Bearer sk-mine"
    assert not [value for headers in fake.headers for value in headers.values() if "secret" in value]


def test_the_proxy_of_the_environment_is_used(monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with eval_fixtures.serve_judge(lambda number, body: make_completion('{"score": 1}')) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        assert ask("http://judge.example/v1")["score"] == 1
    assert proxy.paths == ["http://judge.example/v1/chat/completions"]


def test_an_invalid_proxy_is_a_one_line_error(monkeypatch):
    monkeypatch.setenv("http_proxy", "nonsense://127.0.0.1")
    with pytest.raises(
        vl.ConfigError, match=r"--judge-url http://judge.example/v1: cannot be used .*; check it"
    ) as error:
        ask("http://judge.example/v1")
    assert "\n" not in str(error.value)


def test_a_web_page_is_not_accepted_as_a_reply(waits):
    html = {"Content-Type": "text/html"}
    with (
        eval_fixtures.serve_judge(lambda number, body: (200, "<html>Log in</html>", html)) as fake,
        pytest.raises(JudgeError, match=r"\(its reply is not a chat completion\); check --judge-url"),
    ):
        ask(fake.url)
    with (
        eval_fixtures.serve_judge(lambda number, body: (502, "<html>Bad</html>", html)) as fake,
        pytest.raises(JudgeError, match=r"\(HTTP 502: Bad Gateway\); check --judge-url"),
    ):
        ask(fake.url)


def test_without_openai_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(vl.ConfigError, match=r"--judge-url needs openai, .*: pip install 'vllama-jax\[judge\]'"):
        Judge("http://127.0.0.1/v1", "fake")


@pytest.mark.parametrize(
    "sent", [None, [], {"choices": {}}, {"choices": []}, {"choices": [{"message": 1}]}, "{", "[" * 99_999]
)
def test_an_invalid_completion_is_a_one_line_error(sent, waits):
    with (
        eval_fixtures.serve_judge(lambda number, body: (200, sent)) as fake,
        pytest.raises(JudgeError, match=r"cannot be reached \(.*\); check --judge-url") as error,
    ):
        ask(fake.url)
    assert "\n" not in str(error.value)
