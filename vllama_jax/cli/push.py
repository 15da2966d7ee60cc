"""The command `vllama push`."""

import math
from pathlib import Path

import tyro
from rich import filesize

from vllama_jax.checkpoints.arrays import find_corrupt_params
from vllama_jax.cli._display import Display, format_count
from vllama_jax.cli._progress import bytes_bar
from vllama_jax.cli._usage import UsageError
from vllama_jax.errors import CheckpointError, ConfigError, format_os_error
from vllama_jax.publish.card import make_card, read_verification
from vllama_jax.publish.push import CARD, PushPlan, check_repository, open_to_push, plan_push
from vllama_jax.publish.push import push as upload


def push(
    model: tyro.conf.Positional[Path],
    repository: tyro.conf.Positional[str],
    /,
    *,
    private: bool = False,
    message: str | None = None,
    verify: Path | None = None,
    license: str | None = None,
    card: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Upload a model directory to the Hugging Face Hub, with a model card. hf://OWNER/NAME is then a model.

    Example: vllama push MODEL OWNER/NAME --verify report.json --dry-run

    The weights are checked before they are uploaded, in one commit. The hub needs a token with write access: run `hf
    auth login`, or set HF_TOKEN.

    Args:
        model: The model directory.
        repository: OWNER/NAME of the repository, which is created if it does not exist.
        private: Create a private repository. An existing public one is an error.
        message: The commit message.
        verify: A report of `vllama verify MODEL --against SOURCE --json`, whose figures the card then has.
        license: The license in the card, as the hub names it, such as apache-2.0 for weights of your own. By default
            the card lists the licenses of the published files.
        card: The file to upload as model card (README.md), instead of the one that is made.
        dry_run: Print the files and the card, and upload nothing.
    """
    name = check_repository(repository)
    if card is not None and (verify or license):
        raise UsageError("--card is uploaded as it is; leave out --verify and --license")
    directory = open_to_push(model)
    if card is not None:
        text = _read_card(card)
    else:
        text = make_card(name, directory, read_verification(verify, directory) if verify else None, license)
    plan = plan_push(name, directory, text)
    if dry_run:
        print("\n".join([*_list_files(plan), "", text]), end="")
        return
    _check_weights(plan)
    with Display() as display:
        display.show_message(f"uploading {_format_total(plan)} to hf://{name}")
        pushed = upload(plan, private=private, message=message)
    print(f"{pushed.url}: {_format_total(plan)}, commit {pushed.commit}; the model is hf://{name}")


def _check_weights(plan: PushPlan) -> None:
    """Raise CheckpointError if the hash of a weight is not that of the manifest."""
    with bytes_bar(sum(plan.sizes.values())) as progress:
        corrupt = find_corrupt_params(plan.directory.path / "params", plan.directory.manifest["leaves"], progress)
    if corrupt:
        path, reason = next(iter(corrupt.items()))
        count = format_count(len(corrupt), "array")
        raise CheckpointError(
            f"{plan.directory.path}: {count} corrupt, such as {path} ({reason}); copy or convert the model again"
        )


def _read_card(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(format_os_error(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8; give a Markdown file") from error


def _list_files(plan: PushPlan) -> list[str]:
    sizes = {**plan.sizes, CARD: len(plan.card.encode())}
    width = max(math.ceil(math.log10(size + 1)) for size in sizes.values()) + 4  # with separators
    return [f"{size:>{width},} {name}" for name, size in sorted(sizes.items())] + [f"total {_format_total(plan)}"]


def _format_total(plan: PushPlan) -> str:
    return f"{format_count(len(plan.sizes) + 1, 'file')}, {filesize.decimal(sum(plan.sizes.values()))}"
