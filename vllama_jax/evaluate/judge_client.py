"""Client of a judge: a language model with an OpenAI-compatible chat endpoint.

The judge gets the questions of Video-ChatGPT's evaluation (arXiv 2306.05424) in other words: whether an answer means
the same as the reference answer, or how good it is in one of five aspects. It replies with a score from 0 to 5.
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
REDACTED = "…"  # replaces the key
REFUSED_STATUS_CODES = (400, 413, 422)  # HTTP status codes that concern the prompt, such as its content or length
MAX_RETRIES = 4  # openai waits 0.5, 1, 2 and 4 s, or as long as the endpoint asks (Retry-After)
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
    """The judge cannot be reached or used; the message has the reason."""


class PromptRefusedError(JudgeError):
    """The judge refuses a prompt, as content filters do. It may accept others."""


@dataclasses.dataclass
class Judge:
    """A judge. The key is sent to its URL only, and is removed from all that the endpoint returns.

    Attributes:
        url: The URL of the endpoint, with or without "/chat/completions".
        model: The name of the model at the endpoint.
        max_replies: The maximum number of requests for a case until a reply can be parsed.
        timeout: The timeout of a request, in seconds.
        key: The API key; "" for none.
        greedy: Request temperature 0. Set to False when the model refuses that.

    Raises:
        ConfigError: openai is not installed, or `url` or a proxy of the environment is invalid.
    """

    url: str
    model: str
    max_replies: int = 3
    timeout: float = 60.0
    key: str = dataclasses.field(default="", repr=False)
    greedy: bool = True

    def __post_init__(self) -> None:
        self._client = _make_client(self.base_url, self.key, self.timeout)

    @property
    def base_url(self) -> str:
        """The URL without "/chat/completions"."""
        return self.url.rstrip("/").removesuffix("/chat/completions")

    @property
    def endpoint(self) -> str:
        """The URL of chat completions."""
        return f"{self.base_url}/chat/completions"

    def ask(self, aspect: str, question: Sequence[str], reference: str, answer: Sequence[str]) -> dict[str, Any] | str:
        """Request a judgment.

        Args:
            aspect: A key of `ASPECTS`.
            question: The question, or two versions of it.
            reference: The reference answer.
            answer: The answer to each of them.

        Returns:
            {"score", "reply", "model"}, and "correct" for the aspect "match", where "model" is the name that the
            endpoint reports; or the last reply as text, if `max_replies` of them could not be parsed.

        Raises:
            PromptRefusedError: The endpoint refuses this prompt.
            JudgeError: The endpoint cannot be reached or used.
        """
        messages = _make_messages(aspect, question, reference, answer)
        for _ in range(self.max_replies):
            reply, model = self._complete(messages)
            if (found := parse_reply(reply, aspect)) is not None:
                return {**found, "reply": self.redact(reply), "model": self.redact(model)}
        return self.redact(reply)

    def redact(self, value: Any) -> Any:
        """Remove the key, plain or encoded, from texts, lists and objects, because some endpoints repeat it."""
        if isinstance(value, dict):
            return {self.redact(name): self.redact(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.redact(item) for item in value]
        if isinstance(value, str):
            for encoding in _list_encodings(self.key):
                value = re.sub(re.escape(encoding), REDACTED, value, flags=re.IGNORECASE)
        return value

    def _complete(self, messages: "list[ChatCompletionMessageParam]") -> tuple[str, Any]:
        """Return the reply and the name of the model, with temperature 0 if the model accepts that."""
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
            code = error.status_code
            reason = self._format_reason(f"HTTP {code}: {_read_error_message(error)}")
            if code == 400 and "temperature" in reason and self.greedy:
                self.greedy = False  # some models have a fixed temperature
                return self._complete(messages)
            if code not in (408, 409, 429) and code < 500:  # openai has retried the others
                error_class = PromptRefusedError if code in REFUSED_STATUS_CODES else JudgeError
                message = f"{self.endpoint}: the judge refused the request ({reason}); {_suggest_fix(code)}"
                raise error_class(message) from None
        except (openai.OpenAIError, ValueError, RecursionError) as error:  # no connection, or not a chat endpoint
            reason = self._format_reason(error.__cause__ or error)
        raise JudgeError(f"{self.endpoint}: the judge cannot be reached ({reason}); check --judge-url")

    def _format_reason(self, reason: object) -> str:
        """Return the reason of a failed request in one line, without the key."""
        return self.redact(" ".join(str(reason).split()))[:200]


def _make_client(base_url: str, key: str, timeout: float) -> "openai.OpenAI":
    """Make a client that trusts the system's certificates and follows no redirects, which could leak the key.

    It uses proxies and certificates of the environment (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE), but not OpenAI's
    organization and project, because the endpoint may be another one.
    """
    openai = import_extra("openai", "judge", "--judge-url", ConfigError)
    import httpx

    try:
        return openai.OpenAI(
            base_url=base_url,
            api_key=key or "none",  # openai requires one; without a key, the header is omitted from requests
            timeout=timeout,
            max_retries=MAX_RETRIES,
            default_headers=dict.fromkeys(("OpenAI-Organization", "OpenAI-Project"), openai.Omit()),
            http_client=openai.DefaultHttpxClient(follow_redirects=False, verify=ssl.create_default_context()),
        )
    except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"--judge-url {base_url}: cannot be used ({format_error(error)}); check it and the proxies"
        ) from error


def make_judge(url: str, model: str) -> Judge:
    """Make a judge with the key of the environment variable OPENAI_API_KEY.

    Args:
        url: The URL of the endpoint.
        model: The name of the model at the endpoint.

    Raises:
        ConfigError: The URL or the key is invalid, or openai is not installed.
    """
    if not re.match(r"https?://[^/]", url):
        raise ConfigError(f"--judge-url must begin with http:// or https://, not {url!r}")
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY_VARIABLE} has a line break or another invalid character; set it to the key alone")
    return Judge(url, model, key=key)


def parse_reply(reply: str, aspect: str) -> dict[str, Any] | None:
    """Parse the reply of a judge.

    The last object with a score from 0 to 5 counts. It may be JSON, or a Python dict as in Video-ChatGPT's prompts:
    {'pred': 'yes', 'score': 4}.

    Returns:
        {"score"}, for the aspect "match" with "correct"; None if there is no such object.
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
    """Parse a JSON object or a Python dict; return an empty dict for anything else."""
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            if isinstance(found := parse(text), dict):
                return found
    return {}


def today() -> str:
    """Return the date in UTC, such as "2026-01-31"."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


@functools.cache
def _list_encodings(key: str) -> tuple[str, ...]:
    """Return the encodings of a key that may occur in a response, the longest first: plain, escaped, hex, base64.

    In the base64 of a longer text ("Bearer KEY") a key has one of three forms, depending on its offset. The digits that
    it shares with neighboring text are excluded. Encodings shorter than eight digits are not searched.
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
    for number, (question_text, answer_text) in enumerate(zip(question, answer, strict=True), 1):
        suffix = f" {number}" if len(question) > 1 else ""
        lines += [f"Question{suffix}: {question_text}", f"Answer{suffix}: {answer_text}"]
    correct = '"correct": "yes" or "no", ' if aspect == "match" else ""
    lines += [f"Right answer: {reference}", "", "Reply with one JSON object and nothing else:"]
    lines.append(f'{{{correct}"score": a whole number from 0 to 5}}')
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n".join(lines)}]


def _read_completion(completion: Any) -> tuple[str, Any]:
    """Return the text and the model of a completion, which openai does not validate."""
    try:
        content = completion.choices[0].message.content
    except (AttributeError, LookupError, TypeError):
        raise ValueError("its reply is not a chat completion") from None
    return content if isinstance(content, str) else "", completion.model


def _read_error_message(error: "openai.APIStatusError") -> str:
    """Return the error message of an endpoint, or the reason phrase of the status if there is none or it is HTML."""
    message = error.body.get("message") if isinstance(error.body, dict) else error.body
    if isinstance(message, str) and message and not message.startswith("<"):
        return message
    return error.response.reason_phrase


def _suggest_fix(code: int) -> str:
    if code in (401, 403):
        return f"set {KEY_VARIABLE} to a key that is valid there"
    return "check --judge-url and --judge-model"
