"""Plan the run of a job, and check that all processes run the same code with the same config on the same inputs."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import vllama_jax
from vllama_jax.config import flatten_fields
from vllama_jax.errors import ConfigError
from vllama_jax.runtime.compilation_cache import write_cache_on_every_host
from vllama_jax.runtime.coordination import decide, find_store, share_errors
from vllama_jax.train import setup
from vllama_jax.train.config import TrainConfig

ADVICE = "start the same command with the same installation on all hosts"


def plan_job(config: TrainConfig, base: str = "", out: Path | None = None) -> setup.RunPlan:
    """Plan a run in all processes of a job, as `plan_run` does, and check that they run the same.

    Args:
        config: The run config.
        base: The base model directory, if it is no longer at `config.model`.
        out: The run directory, if there is one.

    Returns:
        The plan.

    Raises:
        VllamaError: The run cannot be planned in a process, or differs from that of process 0. All processes raise the
            same error.
    """
    check_same_job(config, out)
    jax.devices()  # this waits for all processes, so it must not happen where one of them may fail
    write_cache_on_every_host()
    with share_errors():
        plan = setup.plan_run(config, base)
    check_same_inputs({"model": plan.base.digest, **plan.inputs})
    return plan


def check_same_job(config: TrainConfig, out: Path | None) -> None:
    """Compare the code and the config of each process with those of process 0.

    Args:
        config: The run config, after `prepare`.
        out: The directory that the processes write.

    Raises:
        ConfigError: They differ in a process. All processes raise the same error.
    """
    if find_store() is None:
        return
    own = _describe_job(config, out)
    first = decide(lambda: own)
    with share_errors():
        if problem := _find_difference(first, json.loads(json.dumps(own))):
            raise ConfigError(f"{problem}; {ADVICE}")


def check_same_inputs(digests: Mapping[str, str]) -> None:
    """Compare the directories that each process reads with those of process 0.

    Args:
        digests: The digests of the directories, by the config field with their path.

    Raises:
        ConfigError: They differ in a process. All processes raise the same error.
    """
    first = decide(lambda: dict(digests))
    with share_errors():
        if changed := sorted(name for name in digests.keys() | first.keys() if digests.get(name) != first.get(name)):
            raise ConfigError(
                f"{changed[0]}: its files differ from those of process 0; copy them again, or use shared storage"
            )


def digest_source_files(package: Path) -> str:
    """Return a digest of the names and contents of the Python files of a package, including linked directories."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(package, followlinks=True):
        folders.sort()
        for file in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            data = file.read_bytes()
            digest.update(f"{file.relative_to(package)} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _describe_job(config: TrainConfig, out: Path | None) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    fields["datasets"] = {str(number): dataset for number, dataset in enumerate(fields["datasets"])}
    return {
        "code": digest_source_files(Path(vllama_jax.__file__).parent),
        "version": vllama_jax.__version__,
        "jax": jax.__version__,
        "config": {**flatten_fields(fields), "out": str(out)},
    }


def _find_difference(first: dict[str, Any], own: dict[str, Any]) -> str:
    """Describe the first difference of a process from process 0. Return "" if there is none."""
    if own["jax"] != first["jax"]:
        return f"another version of JAX ({own['jax']}, process 0: {first['jax']})"
    if own["code"] != first["code"]:
        versions = (f"{job['version']}, source files {job['code'][:8]}" for job in (own, first))
        return f"another version of vllama_jax ({', process 0: '.join(versions)})"
    names = sorted(first["config"].keys() | own["config"].keys())
    pairs = ((name, own["config"].get(name), first["config"].get(name)) for name in names)
    if changed := [f"{name} {here!r}, process 0: {there!r}" for name, here, there in pairs if here != there]:
        return f"another config than process 0 ({'; '.join(changed[:3])})"
    return ""
