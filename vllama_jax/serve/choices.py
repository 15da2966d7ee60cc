"""Answers of the engine as text and log-probabilities, while they are generated."""

import dataclasses
import re
from collections.abc import AsyncIterator, Sequence
from typing import Literal

from vllama_jax.generate import Request
from vllama_jax.serve.responses import CompletionLogprobs, Logprobs, TokenLogprob, TopLogprob
from vllama_jax.serve.scheduler import AnswerEngine, Update
from vllama_jax.text.prompts import AnswerDecoder
from vllama_jax.text.templates import ChatTemplate
from vllama_jax.text.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new of an answer.

    Attributes:
        index: The number of its request.
        text: The new text.
        tokens: The new tokens, their log-probabilities, and the most probable tokens at their positions. Without the
            tokens that ended the answer.
        finish_reason: Why the answer ended; None if it goes on.
    """

    index: int
    text: str
    tokens: list[tuple[int, float, list[tuple[int, float]]]]
    finish_reason: FinishReason | None


class Choice:
    """An answer, whose tokens arrive in updates.

    Args:
        tokenizer: The model's tokenizer.
        template: The template, with the request's stop texts.
        request: The request.

    Attributes:
        tokens: All tokens so far.
        text: The text so far.
        finish_reason: Why the answer ended; None if it goes on.
        prefill_tokens: The number of tokens of the prompt that were computed.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, request: Request):
        self._decoder = AnswerDecoder(tokenizer, template)
        self._ends = [(token,) for token in tokenizer.eos_ids] + [tuple(stop) for stop in request.stops]
        self._longest_end = max(map(len, self._ends), default=1)
        self._logprobs: list[tuple[int, float, list[tuple[int, float]]]] = []
        self._num_shown = 0
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.prefill_tokens = 0

    @property
    def text(self) -> str:
        """The text so far."""
        return self._decoder.text

    def add(self, update: Update) -> Piece:
        """Add an update, and return what is new."""
        self.tokens += update.tokens
        self.prefill_tokens = update.prefill_tokens
        tops = update.top_logprobs or [[]] * len(update.tokens)
        self._logprobs += zip(update.tokens, update.logprobs, tops, strict=True)
        text = self._decoder.add(update.tokens, is_last=update.finish_reason is not None)
        self.finish_reason = update.finish_reason or ("stop" if self._decoder.has_ended else None)
        end = self._count_shown()
        shown, self._num_shown = self._logprobs[self._num_shown : end], max(end, self._num_shown)
        return Piece(index=update.index, text=text, tokens=shown, finish_reason=self.finish_reason)

    def _count_shown(self) -> int:
        """Return how many tokens are known not to be part of what ends the answer."""
        if self.finish_reason is None:
            return max(len(self.tokens) - self._longest_end, 0)
        matching = [len(end) for end in self._ends if tuple(self.tokens[-len(end) :]) == end]
        return len(self.tokens) - max(matching, default=0)


async def run_choices(
    scheduler: AnswerEngine, requests: Sequence[Request], choices: Sequence[Choice]
) -> AsyncIterator[Piece]:
    """Yield what is new of the answers to requests until all have ended. Closing it cancels them.

    Args:
        scheduler: The scheduler.
        requests: The requests.
        choices: A choice for each.

    Raises:
        EngineFailed: The engine cannot answer any more.
    """
    with scheduler.submit(requests) as answers:
        async for update in answers:
            choice = choices[update.index]
            piece = choice.add(update)
            if piece.finish_reason is not None and update.finish_reason is None:
                answers.cancel(update.index)  # the text has a stop string that is no sequence of tokens
            yield piece


def make_logprobs(tokenizer: Tokenizer, piece: Piece) -> Logprobs:
    """Return the log-probabilities of a piece in the shape of chat completions."""
    return Logprobs(
        content=[
            TokenLogprob(
                **_describe(tokenizer, token, logprob).model_dump(),
                top_logprobs=[_describe(tokenizer, other, value) for other, value in top],
            )
            for token, logprob, top in piece.tokens
        ]
    )


def make_completion_logprobs(tokenizer: Tokenizer, piece: Piece) -> CompletionLogprobs:
    """Return the log-probabilities of a piece in the shape of completions."""
    return CompletionLogprobs(
        tokens=[token_text(tokenizer, token) for token, _, _ in piece.tokens],
        token_logprobs=[logprob for _, logprob, _ in piece.tokens],
        top_logprobs=[{token_text(tokenizer, other): value for other, value in top} for _, _, top in piece.tokens],
    )


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token, with the space before it if it has one."""
    (name,) = tokenizer.tokens([token])
    text = tokenizer.decode([token])
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text or name


def _describe(tokenizer: Tokenizer, token: int, logprob: float) -> TopLogprob:
    text = token_text(tokenizer, token)
    byte = _BYTE.fullmatch(tokenizer.tokens([token])[0])
    return TopLogprob(token=text, logprob=logprob, bytes=[int(byte[1], 16)] if byte else list(text.encode()))
