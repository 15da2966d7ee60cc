"""Validation during a run: the loss on held-out records, and answers about given clips."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from vllama_jax.branches import find_branch
from vllama_jax.chat import Chat
from vllama_jax.data.pipeline import HostBatch
from vllama_jax.data.sampling import Rows, Stream
from vllama_jax.io.jsonl import JsonLinesFile
from vllama_jax.media_tokens import PreparedMedia, prepare_media
from vllama_jax.model import Model
from vllama_jax.train.batch_exchange import BatchExchange
from vllama_jax.train.setup import RunPlan, shard_batch
from vllama_jax.train.state import Weights
from vllama_jax.train.step import make_eval_step


class Validation:
    """The validation of a run, which writes its results to samples.jsonl.

    Args:
        plan: The plan of the run.
        out: The run directory.
        report_masked: Called with the step, the dataset and each batch of held-out records, to report masked records.

    Raises:
        MediaError: A clip cannot be read, or the trained branch cannot encode it.
    """

    def __init__(self, plan: RunPlan, out: Path, report_masked: Callable[[int, str, HostBatch], None]):
        self._plan, self._report_masked = plan, report_masked
        self._exchange = BatchExchange(plan.reader.rows)
        self._cfg = plan.config.validation
        self.journal = JsonLinesFile(out / "samples.jsonl")
        self._clips = [_prepare_clip(clip, plan) for clip in self._cfg.clips] if self._cfg.interval_steps else []
        self._evaluate = jax.jit(make_eval_step(plan.config, plan.abstract_model, plan.loss))

    def is_due(self, step: int) -> bool:
        """Return whether to validate after `step`."""
        return bool(self._cfg.interval_steps) and step % self._cfg.interval_steps == 0

    def run(self, step: int, weights: Weights, frozen: Weights) -> Iterator[str]:
        """Validate, write the results to samples.jsonl, and yield a message about each.

        Args:
            step: Number of steps done.
            weights: The trainable parameters.
            frozen: The frozen parameters.
        """
        streams = [stream for stream in self._plan.reader.sampler.streams if stream.dataset.holdout]
        if streams:
            loss, tokens, unused = self._sum_loss(step, streams, weights, frozen)
            if tokens:
                self._write({"step": step, "validation_loss": loss / tokens})
                yield f"step {step}: validation loss {loss / tokens:.4f}"
            else:
                yield f"step {step}: no validation loss: no held-out record can be used; the first: {unused[0]}"
        for clip in self._clips:
            answer = self._answer(clip, weights, frozen)
            self._write({"step": step, "clip": clip.report.path, "answer": answer})
            yield f"step {step}: {clip.report.path}: {answer}"

    def _sum_loss(
        self, step: int, streams: list[Stream], weights: Weights, frozen: Weights
    ) -> tuple[float, int, list[str]]:
        """Compute the loss on held-out batches, which are the same at each validation.

        Returns:
            The sum of the loss, the number of labels, and a message for each masked record.
        """
        total, tokens, size = 0.0, 0, self._plan.config.batch_size
        unused: list[str] = []
        for number in range(self._cfg.num_batches):
            stream = streams[number % len(streams)]
            records = stream.holdout()
            first = number // len(streams) * size
            rows = Rows(stream, [(records[(first + row) % len(records)], 0) for row in range(size)])
            name = f"{step}-{number}"
            batch = self._exchange.read(name, functools.partial(self._plan.reader.read, rows))
            self._report_masked(step, stream.dataset.path, batch)
            unused += [f"{record}: {why}" for record, why in batch.masked]
            loss, count = self._evaluate(weights, frozen, shard_batch(batch.arrays, self._plan))
            total, tokens = total + float(loss), tokens + int(count)
            self._exchange.remove(name)
        return total, tokens, unused

    def _answer(self, clip: PreparedMedia, weights: Weights, frozen: Weights) -> str:
        cast = {path: weight.astype(self._plan.dtype) for path, weight in weights.items()}
        network = self._plan.abstract_model.build({**frozen, **cast})
        chat = Chat(Model(self._plan.base.config, self._plan.base.tokenizer, network))
        chat.add_prepared(clip)
        return "".join(chat.ask(self._cfg.question, max_new_tokens=self._cfg.max_new_tokens))

    def _write(self, fields: dict) -> None:
        if jax.process_index() == 0:
            self.journal.add(fields)


def _prepare_clip(clip: str, plan: RunPlan) -> PreparedMedia:
    """Read a clip for the trained branch: frames without audio, or audio without frames."""
    if find_branch(plan.config.branch).prompt_array == "frames":
        return prepare_media(clip, plan.base.config, audio=False)
    prepared = prepare_media(clip, plan.base.config, require_audio=True)
    return dataclasses.replace(prepared, frames=None, report=dataclasses.replace(prepared.report, kind="audio"))
