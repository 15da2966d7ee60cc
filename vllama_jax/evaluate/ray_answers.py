"""Answer requests on a Ray cluster, with Ray Data: `vllama generate --ray`.

Requests are sent in blocks to a pool of actors, each of which loads the model once. Ray restarts an actor that dies,
and sends its blocks again.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import math
import os
import pickle
import re
import socket
import sys
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vllama_jax.answering import AnsweringOptions, FileQuestion
from vllama_jax.checkpoints.directory import ModelDirectory, open_model
from vllama_jax.errors import CheckpointError, ConfigError, VllamaError, format_error
from vllama_jax.evaluate.answer_file import answer_requests
from vllama_jax.model import Model, load_copies, remove_missing_branches
from vllama_jax.runtime.extras import import_extra

LOCAL = "local"
ACCELERATORS = ("GPU", "TPU")  # resources of Ray
BLOCKS_PER_WORKER = 4  # at least, so that fast workers answer more of them than slow ones
BATCHES_PER_BLOCK = 8  # at most: the answers of a block are lost if its worker dies
MAX_ATTEMPTS = 4  # at a block, whose worker died each time
CONNECTION_SECONDS = 10.0
COLOR = re.compile(r"\x1b\[\d+m")
STORE_BYTES = 2**27  # of a local cluster's object store: requests and answers are small


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where requests are answered.

    Attributes:
        address: The address of a cluster that this machine is part of, "auto" to find it, or "local" to start a cluster
            of this machine.
        workers: The number of processes with the model; None for one for each accelerator, or for each machine without.
        devices: The number of devices of each worker; None for one.
    """

    address: str
    workers: int | None = None
    devices: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What a worker needs to answer requests.

    Attributes:
        model: The model or run directory, as workers find it.
        base: The base model of a run, if it has moved.
        digest: The digest of the model.
        weights: Options of `load_copies`.
        answering: Options that all requests share.
        audio: Whether to use the audio of videos.
    """

    model: str
    base: str | None
    digest: str
    weights: dict[str, Any]
    answering: AnsweringOptions
    audio: bool


def import_ray() -> ModuleType:
    """Import Ray with Ray Data.

    Raises:
        ConfigError: It is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports the use of a cluster to its authors
    import_extra("ray.data", "ray", "--ray", ConfigError)
    return import_extra("ray", "ray", "--ray", ConfigError)


def answer_with_ray(
    questions: Sequence[FileQuestion],
    options: RayOptions,
    worker: WorkerOptions,
    log: Path,
    report_status: Callable[[str], None],
) -> Generator[dict[str, Any]]:
    """Answer requests with the workers of a Ray cluster.

    Args:
        questions: The requests, whose files are `FileRequest`s. Those about the same files are sent to one worker.
        options: The cluster.
        worker: What its workers need.
        log: A file that Ray's messages are appended to.
        report_status: Called with a line about the progress.

    Yields:
        The line of each request in the file of answers, as soon as its block is complete.

    Raises:
        ConfigError: Ray is not installed, the cluster cannot be used, or it has fewer devices than requested.
        CheckpointError: A worker cannot open or load the model, or its model is another one.
        VllamaError: Workers died again and again at the same requests, or the cluster has failed.
    """
    if not questions:
        return
    ray = import_ray()
    report_status("starting Ray" if options.address == LOCAL else f"connecting to Ray at {options.address}")
    with _redirect_output(log), _connect(ray, options):
        count, resources = _plan_workers(ray, options)
        report_status(f"waiting for {count} workers of Ray" if count > 1 else "waiting for the worker of Ray")
        size = min(math.ceil(len(questions) / (count * BLOCKS_PER_WORKER)), worker.answering.rows * BATCHES_PER_BLOCK)
        blocks = [
            {"number": number, "questions": pickle.dumps([_make_paths_absolute(question) for question in block])}
            for number, block in enumerate(_make_blocks(questions, size))
        ]
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()
        answers = ray.data.from_items(blocks, override_num_blocks=len(blocks)).flat_map(
            _Worker,
            fn_constructor_args=(worker, options.devices, attempts),
            compute=ray.data.ActorPoolStrategy(size=count),
            **resources,
        )
        try:
            for table in answers.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
                for row in table.to_pylist():
                    if row["failure"]:
                        raise CheckpointError(row["failure"])
                    yield json.loads(row["line"])
        except ray.exceptions.RayTaskError:  # an error in our code, with its traceback
            raise
        except ray.exceptions.RayError as error:
            raise VllamaError(f"--ray {options.address}: {_describe_failure(error)}") from error


def _describe_failure(error: Exception) -> str:
    """Return the first and the last line of an error of Ray. It may end with the traceback of another process."""
    lines = COLOR.sub("", str(error)).strip().splitlines() or [type(error).__name__]
    return "; ".join(dict.fromkeys(" ".join(line.split())[:200] for line in (lines[0], lines[-1])))


class _Attempts:
    """Counts how often the workers have started to answer each block. It is an actor of Ray."""

    def __init__(self) -> None:
        self._counts: collections.Counter[int] = collections.Counter()

    def add(self, block: int) -> int:
        """Count another attempt at a block, and return their number."""
        self._counts[block] += 1
        return self._counts[block]


class _Worker:
    """Answers blocks of requests. It is an actor of Ray, which loads the model for its first block."""

    def __init__(self, options: WorkerOptions, devices: int | None, attempts: Any):
        self._options, self._devices, self._attempts = options, devices, attempts
        self._directory: ModelDirectory | None = None
        self._models: list[Model] = []

    def __call__(self, block: dict[str, Any]) -> list[dict[str, str]]:
        """Return a row for each request of a block, with its line in JSON, or one row with what has failed."""
        questions = pickle.loads(block["questions"])
        attempt = import_ray().get(self._attempts.add.remote(block["number"]))
        try:
            if attempt > MAX_ATTEMPTS:
                raise VllamaError(
                    f"{MAX_ATTEMPTS} workers of Ray died while they answered request {questions[0].key}"
                    f"{f' and {len(questions) - 1} others' if len(questions) > 1 else ''} (a crash, or too little "
                    "memory); answers so far are kept, run the command again"
                )
            return [{"line": json.dumps(line), "failure": ""} for line in self._answer(questions)]
        except VllamaError as error:
            where = "" if attempt > MAX_ATTEMPTS else f"a worker of Ray on {socket.gethostname()}: "
            return [{"line": "", "failure": f"{where}{error}"}]

    def _answer(self, questions: Sequence[FileQuestion]) -> Iterator[dict[str, Any]]:
        options = self._options
        if self._directory is None:
            directory = remove_missing_branches(open_model(options.model, options.base))
            if directory.digest != options.digest:
                raise CheckpointError(
                    f"{options.model}: another model than on the machine of the command; copy that model there"
                )
            self._directory = directory
        yield from answer_requests(
            self._load_models, questions, self._directory.config, options.answering, audio=options.audio
        )

    def _load_models(self) -> list[Model]:
        if not self._models and self._directory is not None:
            self._models = load_copies(self._directory, self._devices, **self._options.weights)
        return self._models


def _make_blocks(questions: Sequence[FileQuestion], size: int) -> list[list[FileQuestion]]:
    """Divide questions into blocks of about `size`. Those about the same files are in one block."""
    groups: dict[tuple[Hashable, ...], list[FileQuestion]] = {}
    for question in questions:
        groups.setdefault(question.files, []).append(question)
    blocks: list[list[FileQuestion]] = []
    for group in groups.values():
        if not blocks or len(blocks[-1]) + len(group) > size:
            blocks.append([])
        blocks[-1] += group
    return blocks


def _make_paths_absolute(question: FileQuestion) -> FileQuestion:
    """Return a question with absolute paths, because workers have another working directory."""
    files: tuple[Any, ...] = question.files
    return dataclasses.replace(
        question, files=tuple(dataclasses.replace(file, path=Path.cwd() / file.path) for file in files)
    )


def _plan_workers(ray: ModuleType, options: RayOptions) -> tuple[int, dict[str, Any]]:
    """Return the number of workers, and the resources of each as arguments for Ray Data."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind = next((kind for kind in ACCELERATORS if any(machine.get(kind) for machine in machines)), "CPU")
    each = 1 if kind == "CPU" else options.devices or 1
    room = [int(machine.get(kind, 0) // each) for machine in machines]
    count = options.workers or (sum(min(one, 1) for one in room) if kind == "CPU" else sum(room)) or 1
    if count > sum(room):
        raise ConfigError(
            f"--ray {options.address}: the cluster has room for {sum(room)} workers of {each} {kind}"
            f"{'s' if each > 1 else ''} each, not {count}; use fewer, or start Ray on more machines"
        )
    resources: dict[str, dict[str, Any]] = {
        "CPU": {"num_cpus": each},
        "GPU": {"num_gpus": each, "num_cpus": 0},  # Ray Data's default would be one
        "TPU": {"resources": {"TPU": each}, "num_cpus": 0},
    }
    return count, resources[kind]


@contextlib.contextmanager
def _connect(ray: ModuleType, options: RayOptions) -> Iterator[None]:
    """Connect this process to a cluster, which is started and stopped if it is local."""
    address = options.address
    local = {"num_cpus": options.workers or 1, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        if address not in (LOCAL, "auto"):
            _check_address(address)
        ray.init(
            address=address,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
            **(local if address == LOCAL else {}),
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        advice = f"start one with `ray start`, or use --ray {LOCAL}"
        raise ConfigError(f"--ray {address}: no Ray cluster can be used ({format_error(error)}); {advice}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Check that a process listens at an address, because Ray tries to connect for minutes.

    Raises:
        ConfigError: It is not an address.
        OSError: Nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdecimal():
        raise ConfigError(f"--ray {address}: must be HOST:PORT of a cluster with this machine, auto or {LOCAL}")
    with socket.create_connection((host.strip("[]"), int(port)), CONNECTION_SECONDS):
        pass


@contextlib.contextmanager
def _redirect_output(log: Path) -> Iterator[None]:
    """Append to a file what Ray prints on stdout and its C++ code on file descriptor 2. `sys.stderr` stays usable."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # the others write to files
            handler.setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(log.open("a"))
        stack.enter_context(contextlib.redirect_stdout(file))
        previous = os.dup(2)
        stack.callback(os.close, previous)
        terminal = sys.__stderr__
        if terminal is not None and sys.stderr is terminal:
            visible = os.fdopen(os.dup(2), "w", buffering=1, encoding=terminal.encoding, errors=terminal.errors)
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(visible)))
        os.dup2(file.fileno(), 2)
        stack.callback(os.dup2, previous, 2)
        yield
