"""Upload a model directory to the Hugging Face Hub in one commit."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllama_jax.checkpoints.directory import ModelDirectory, find_model, open_model, read_config
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.hub import explain_hub_error, hub_output, import_hub
from vllama_jax.io.paths import list_file_sizes, require_local

REPOSITORY = re.compile(r"(hf://)?(?P<name>[\w.-]+/[\w.-]+)")
CARD = "README.md"
OPTIONS = {"vision": "--vl", "audio": "--al"}  # of `vllama convert`, by the branch that a run trained
_ENTRIES = ("config.json", "manifest.json", "params", "tokenizer")  # of a model directory


class PushedModel(NamedTuple):
    """The result of an upload.

    Attributes:
        url: The address of the repository's page.
        commit: The hash of the commit.
    """

    url: str
    commit: str


@dataclasses.dataclass(frozen=True)
class PushPlan:
    """What is uploaded.

    Attributes:
        repository: "OWNER/NAME".
        directory: The model directory.
        sizes: The size in bytes of each file of it, by its path in the repository.
        card: The model card.
    """

    repository: str
    directory: ModelDirectory
    sizes: Mapping[str, int]
    card: str


def check_repository(name: str) -> str:
    """Return the name OWNER/NAME of a repository. Raise ConfigError if it is none."""
    found = REPOSITORY.fullmatch(name)
    if found is None:
        raise ConfigError(f"{name}: not the name of a repository on the hub; write OWNER/NAME, without a revision")
    return found["name"]


def open_to_push(path: str | Path) -> ModelDirectory:
    """Open a model directory that is going to be uploaded.

    Raises:
        CheckpointError: `path` is a run directory, or no model directory.
    """
    local = require_local(find_model(path), CheckpointError)
    fields = read_config(local)
    if "base" in fields:
        run = fields.get("run")
        branch = run.get("branch") if isinstance(run, dict) else None
        option = OPTIONS.get(branch) if isinstance(branch, str) else None
        base = fields["base"].get("path", "BASE") if isinstance(fields["base"], dict) else "BASE"
        raise CheckpointError(
            f"{path}: a run directory; merge it with its base model first: "
            f"vllama convert --base {base} {option or '/'.join(OPTIONS.values())} {path} --out MODEL"
        )
    return open_model(local)


def plan_push(repository: str, directory: ModelDirectory, card: str) -> PushPlan:
    """List the files of a model directory that are uploaded. Other files next to them are not."""
    sizes = list_file_sizes(directory.path)
    listed = {name: size for name, size in sorted(sizes.items()) if name.partition("/")[0] in _ENTRIES}
    return PushPlan(repository, directory, listed, card)


def push(plan: PushPlan, *, private: bool = False, message: str | None = None) -> PushedModel:
    """Create the repository unless it exists, and upload the model in one commit.

    Files of an earlier model in the repository that the new one does not have are deleted in the same commit.

    Args:
        plan: What `plan_push` returned.
        private: Create a private repository.
        message: The commit message; by default one with the digest of the model.

    Raises:
        CheckpointError: The hub refuses it or cannot be reached, or `private` is set and the repository exists and is
            public.
    """
    hub = import_hub()
    try:
        api = hub.HfApi(library_name="vllama-jax")
        url = api.create_repo(plan.repository, private=private or None, exist_ok=True)
        if private and not api.model_info(plan.repository).private:
            raise CheckpointError(
                f"hf://{plan.repository}: exists and is public, and --private does not change that; nothing was "
                "uploaded. Change it in its settings, or choose another name"
            )
        operations = _list_operations(hub, plan, api.list_repo_files(plan.repository))
        message = message or f"Upload model {plan.directory.digest}"
        with hub_output(hub, show_progress=True):
            commit = api.create_commit(plan.repository, operations, commit_message=message)
    except CheckpointError:
        raise
    except Exception as error:  # the hub and the network raise many types
        raise CheckpointError(f"hf://{plan.repository}: {explain_hub_error(error, 'uploaded')}") from error
    return PushedModel(str(url), commit.oid)


def _list_operations(hub: Any, plan: PushPlan, present: list[str]) -> list[Any]:
    stale = [name for name in present if name.partition("/")[0] in _ENTRIES and name not in plan.sizes]
    return [
        hub.CommitOperationAdd(CARD, plan.card.encode()),
        *(hub.CommitOperationAdd(name, str(plan.directory.path / name)) for name in plan.sizes),
        *(hub.CommitOperationDelete(name) for name in stale),
    ]
