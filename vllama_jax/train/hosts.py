"""Check at the start of a job that all processes run the same code with the same config."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import vllama_jax
from vllama_jax.config import flatten_fields
from vllama_jax.errors import ConfigError
from vllama_jax.runtime.coordination import decide, find_store, share_errors
from vllama_jax.train.config import TrainConfig

ADVICE = "start the same command with the same installation on all hosts"


def check_same_job(config: TrainConfig) -> None:
    """Compare the code and the config of each process with those of process 0.

    Args:
        config: The run config, after `prepare`.

    Raises:
        ConfigError: They differ in a process. All processes raise the same error.
    """
    if find_store() is None:
        return
    own = _describe_job(config)
    first = decide(lambda: own)
    with share_errors():
        if problem := _find_difference(first, json.loads(json.dumps(own))):
            raise ConfigError(f"{problem}; {ADVICE}")


def digest_source_files(package: Path) -> str:
    """Return a digest of the names and contents of the Python files of a package, including linked directories."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(package, followlinks=True):
        folders.sort()
        for file in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            data = file.read_bytes()
            digest.update(f"{file.relative_to(package)} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _describe_job(config: TrainConfig) -> dict[str, Any]:
    import jax

    fields = dataclasses.asdict(config)
    fields["datasets"] = {str(number): dataset for number, dataset in enumerate(fields["datasets"])}
    return {
        "code": digest_source_files(Path(vllama_jax.__file__).parent),
        "version": vllama_jax.__version__,
        "jax": jax.__version__,
        "config": flatten_fields(fields),
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
