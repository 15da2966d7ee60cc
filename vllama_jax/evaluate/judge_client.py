"""Scores by a language model behind an OpenAI-compatible chat endpoint.

What is asked of it is what Video-ChatGPT's evaluation asks (arXiv 2306.05424), in our words: whether an answer means
the same as the right one, or how well it does in one of five aspects; a score from 0 to 5 either way.
"""

import ast
import base64
import contextlib
import dataclasses
import datetime
import functools
import html
import json
import os
import re
import ssl
import urllib.parse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllama_jax.errors import ConfigError, VllamaError, format_error
from vllama_jax.runtime.extras import import_extra

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletionMessageParam

KEY_VARIABLE = "OPENAI_API_KEY"
REDACTED = "…"  # in place of the key
REFUSED_STATUS_CODES = (400, 413, 422)  # for what a prompt says or how long it is
MAX_RETRIES = (
    4  # of a request; openai waits 0.5, 1, 2 and 4 s between them, or as long as the endpoint asks (Retry-After)
)
ASPECTS = {
    "match": "Does the answer mean the same as the right answer? Other words for the same thing count as the same. "
    "5: the same meaning; 0: another meaning.",
    "correctness": "Is what the answer says about the video true, as far as the right answer tells, and not "
    "misleading? Other words for the same thing are fine. 5: all of it is true; 0: none of it.",
    "detail": "Does the answer have all main points of the right answer, and does it name particulars of this video "
    "instead of generalities? 5: complete and specific; 0: neither.",
    "context": "Does the answer fit what the video is about as a whole, its overall theme as the right answer shows "
    "it? 5: it fits fully; 0: it misses what the video is about.",
    "temporal": "Does the answer get the order of events in the video right, and when things happen? Other words for "
    "the same order are fine. 5: all of it is right; 0: none of it.",
    "consistency": "The same thing was asked in two ways. Do both answers agree with each other and with the right "
    "answer, without contradictions? 5: fully; 0: not at all.",
}
SYSTEM = "You grade answers to questions about videos. You have not seen the video: the right answer is all you know."


class JudgeError(VllamaError):
    """The judge cannot be asked at all; the message says why."""


class PromptRefusedError(JudgeError):
    """The judge refuses this prompt, as content filters do; it may take another one."""


@dataclasses.dataclass
class Judge:
    """An endpoint and the model to ask there. The key is sent to this URL only; what comes back is scrubbed of it.

    timeout: of a request, in seconds. tries: to get a reply that can be read.
    greedy: whether temperature 0 is asked for; it is not any more after the model has refused that.

    Raises:
        ConfigError: openai is not installed, or `url` or a proxy of the environment is not one.
    """

    url: str
    model: str
    max_replies: int = 3
    timeout: float = 60.0
    key: str = dataclasses.field(default="", repr=False)
    greedy: bool = True

    def __post_init__(self) -> None:
        self._client = _client(self.base, self.key, self.timeout)

    @property
    def base(self) -> str:
        return self.url.rstrip("/").removesuffix("/chat/completions")

    @property
    def endpoint(self) -> str:
        return f"{self.base}/chat/completions"

    def ask(self, aspect: str, question: Sequence[str], reference: str, answer: Sequence[str]) -> dict[str, Any] | str:
        """{"score", "reply", "model"}, for "match" also "correct"; model: as the endpoint names it.

        The last reply, where `tries` in turn are not what is asked for.
        question, answer: one, or two of each where the same is asked in two ways. Raises Refused, Unreachable.
        """
        messages = _make_messages(aspect, question, reference, answer)
        for _ in range(self.max_replies):
            reply, model = self._complete(messages)
            if (found := parse_reply(reply, aspect)) is not None:
                return {**found, "reply": self.redact(reply), "model": self.redact(model)}
        return self.redact(reply)

    def redact(self, said: Any) -> Any:
        """What an endpoint says, without the key, which some repeat, plain or encoded: in texts, lists and objects."""
        if isinstance(said, dict):
            return {self.redact(name): self.redact(value) for name, value in said.items()}
        if isinstance(said, list):
            return [self.redact(value) for value in said]
        if isinstance(said, str):
            for form in _list_encodings(self.key):
                said = re.sub(re.escape(form), REDACTED, said, flags=re.IGNORECASE)
        return said

    def _complete(self, messages: "list[ChatCompletionMessageParam]") -> tuple[str, Any]:
        """The endpoint's reply and the model that it names, greedy where its model allows that."""
        import openai

        temperature = 0 if self.greedy else openai.omit
        headers = {} if self.key else {"Authorization": openai.Omit()}
        try:
            return _read_completion(
                self._client.chat.completions.create(
                    model=self.model, messages=messages, extra_headers=headers, temperature=temperature
                )
            )
        except openai.APIStatusError as error:
            code, why = (
                error.status_code,
                self._format_reason(f"HTTP {error.status_code}: {_read_error_message(error)}"),
            )
            if code == 400 and "temperature" in why and self.greedy:
                self.greedy = False  # some models have one temperature only
                return self._complete(messages)
            if code not in (408, 409, 429) and code < 500:  # openai has asked again for these
                kind = PromptRefusedError if code in REFUSED_STATUS_CODES else JudgeError
                raise kind(f"{self.endpoint}: the judge refuses ({why}); {_suggest_fix(code)}") from None
        except (openai.OpenAIError, ValueError, RecursionError) as error:  # nobody there, or no chat endpoint
            why = self._format_reason(error.__cause__ or error)
        raise JudgeError(f"{self.endpoint}: the judge cannot be reached ({why}); check --judge-url")

    def _format_reason(self, why: object) -> str:
        """Why a request failed, in one line and without the key."""
        return self.redact(" ".join(str(why).split()))[:200]


def _client(base: str, key: str, timeout: float) -> "openai.OpenAI":
    """A client that follows no redirect, which would take the key elsewhere, and trusts the certificates of the system.

    Of the environment it takes proxies and certificates (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE), and no organization
    or project: those are of OpenAI, and the endpoint may be another one.
    """
    openai = import_extra("openai", "judge", "--judge-url", ConfigError)
    import httpx

    try:
        return openai.OpenAI(
            base_url=base,
            api_key=key or "none",  # openai wants one; its header is left out of requests
            timeout=timeout,
            max_retries=MAX_RETRIES,
            default_headers=dict.fromkeys(("OpenAI-Organization", "OpenAI-Project"), openai.Omit()),
            http_client=openai.DefaultHttpxClient(follow_redirects=False, verify=ssl.create_default_context()),
        )
    except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"--judge-url {base}: cannot be used ({format_error(error)}); check it and the proxies"
        ) from error


def make_judge(url: str, model: str) -> Judge:
    """A judge with the key from the environment. Raises ConfigError for a URL or a key that is none."""
    if not re.match(r"https?://[^/]", url):
        raise ConfigError(f"--judge-url must begin with http:// or https://, not {url!r}")
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY_VARIABLE} holds a line break or a letter that no key has; set it to the key alone")
    return Judge(url, model, key=key)


def parse_reply(reply: str, aspect: str) -> dict[str, Any] | None:
    """The judgement in a reply: the last object that has a score from 0 to 5; None where there is none.

    Objects are JSON or, as Video-ChatGPT asks for, Python: {'pred': 'yes', 'score': 4}.
    """
    for text in reversed(re.findall(r"\{[^{}]*\}", reply)):
        found = _parse_object(text)
        score, correct = found.get("score"), str(found.get("correct", found.get("pred", ""))).lower()
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 5:
            continue
        if aspect != "match":
            return {"score": score}
        if correct in ("yes", "no", "true", "false"):
            return {"score": score, "correct": correct in ("yes", "true")}
    return None


def _parse_object(text: str) -> dict[str, Any]:
    """A JSON object or a Python dict; an empty one for what is neither."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            if isinstance(found := read(text), dict):
                return found
    return {}


def today() -> str:
    """The date in UTC, as results record it."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


@functools.cache
def _list_encodings(key: str) -> tuple[str, ...]:
    """How a key may be written in what an endpoint sends back, the longest first: plain, escaped, hexadecimal, base64.

    In the base64 of a longer text ("Bearer KEY") a key has one of three forms, by where it begins; the digits that it
    shares with its neighbours are left out. What is shorter than eight digits is not searched: it says little.
    """
    if not key:
        return ()
    forms = {key, urllib.parse.quote(key), urllib.parse.quote(key, safe=""), html.escape(key), json.dumps(key)[1:-1]}
    encoded = {key.encode().hex()}
    for before in range(3):
        digits = base64.b64encode(bytes(before) + key.encode()).decode().rstrip("=")
        end = len(digits) - (1 if (before + len(key)) % 3 else 0)
        inner = digits[-(-before * 4 // 3) : end]
        encoded |= {inner, inner.translate(str.maketrans("+/", "-_"))}
    forms |= {form for form in encoded if len(form) >= 8}
    return tuple(sorted(forms, key=len, reverse=True))


def _make_messages(
    aspect: str, question: Sequence[str], reference: str, answer: Sequence[str]
) -> "list[ChatCompletionMessageParam]":
    lines = [ASPECTS[aspect], ""]
    for number, (asked, said) in enumerate(zip(question, answer, strict=True), 1):
        which = f" {number}" if len(question) > 1 else ""
        lines += [f"Question{which}: {asked}", f"Answer{which}: {said}"]
    correct = '"correct": "yes" or "no", ' if aspect == "match" else ""
    lines += [f"Right answer: {reference}", "", "Reply with one JSON object and nothing else:"]
    lines.append(f'{{{correct}"score": a whole number from 0 to 5}}')
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n".join(lines)}]


def _read_completion(completion: Any) -> tuple[str, Any]:
    """What a completion says, and the model that it names. openai does not check what an endpoint sends."""
    try:
        content = completion.choices[0].message.content
    except (AttributeError, LookupError, TypeError):
        raise ValueError("its reply is not a chat completion") from None
    return content if isinstance(content, str) else "", completion.model


def _read_error_message(error: "openai.APIStatusError") -> str:
    """What an endpoint says of an error; the status in words where that is nothing, or a web page."""
    said = error.body.get("message") if isinstance(error.body, dict) else error.body
    if isinstance(said, str) and said and not said.startswith("<"):
        return said
    return error.response.reason_phrase


def _suggest_fix(code: int) -> str:
    if code in (401, 403):
        return f"set {KEY_VARIABLE} to a key that is valid there"
    return "check --judge-url and --judge-model"
