"""What is looked at on the way: the loss on held-out records, and answers about fixed clips."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax

from vllama_jax.chat import Chat, Prepared, prepare
from vllama_jax.checkpoint import Model
from vllama_jax.data.order import Rows
from vllama_jax.journal import Journal
from vllama_jax.train.session import Plan, place
from vllama_jax.train.state import Weights
from vllama_jax.train.step import make_evaluation


class Validation:
    """Raises MediaError at once for clips that cannot be shown to this run."""

    def __init__(self, plan: Plan, out: Path):
        self._plan = plan
        self._cfg = plan.config.validation
        self.journal = Journal(out / "samples.jsonl")
        self._clips = [_prepared(clip, plan) for clip in self._cfg.clips] if self._cfg.every else []
        self._evaluate = jax.jit(make_evaluation(plan.config, plan.skeleton))

    def due(self, step: int) -> bool:
        return bool(self._cfg.every) and step % self._cfg.every == 0

    def run(self, step: int, weights: Weights, frozen: Weights) -> Iterator[str]:
        """Lines about how the model does now."""
        streams = [stream for stream in self._plan.reader.order.streams if stream.dataset.held_out]
        if streams:
            loss = self._loss(streams, weights, frozen)
            self._note({"step": step, "validation_loss": loss})
            yield f"step {step}: validation loss {loss:.4f}"
        for clip in self._clips:
            answer = self._answer(clip, weights, frozen)
            self._note({"step": step, "clip": clip.report.path, "answer": answer})
            yield f"step {step}: {clip.report.path}: {answer}"

    def _loss(self, streams: list, weights: Weights, frozen: Weights) -> float:
        """The mean over all labelled tokens of the held-out batches, the same at every look."""
        total, tokens, size = 0.0, 0, self._plan.config.batch_size
        for number in range(self._cfg.batches):
            stream = streams[number % len(streams)]
            records = stream.held_out()
            first = number // len(streams) * size
            rows = Rows(stream, [(records[(first + row) % len(records)], 0) for row in range(size)])
            batch = self._plan.reader.read(rows)
            loss, count = self._evaluate(weights, frozen, place(batch.arrays, self._plan))
            total, tokens = total + float(loss), tokens + int(count)
        return total / max(tokens, 1)

    def _answer(self, clip: Prepared, weights: Weights, frozen: Weights) -> str:
        cast = {path: weight.astype(self._plan.dtype) for path, weight in weights.items()}
        network = self._plan.skeleton.build({**frozen, **cast})
        chat = Chat(Model(self._plan.base.config, self._plan.base.tokenizer, network))
        chat.show(clip)
        return "".join(chat.ask(self._cfg.question, max_new_tokens=self._cfg.max_new_tokens))

    def _note(self, fields: dict) -> None:
        if jax.process_index() == 0:
            self.journal.add(fields)


def _prepared(clip: str, plan: Plan) -> Prepared:
    """A clip as the branch that learns takes it: its frames, or its sound alone."""
    if plan.config.branch == "vision":
        return prepare(clip, plan.base.config, audio=False)
    heard = prepare(clip, plan.base.config, require_audio=True)
    return dataclasses.replace(heard, frames=None, report=dataclasses.replace(heard.report, kind="audio"))
