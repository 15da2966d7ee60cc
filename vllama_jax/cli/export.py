"""The command `vllama export`."""

from pathlib import Path

import tyro

from vllama_jax.checkpoints.directory import open_model
from vllama_jax.cli._devices import use_cpu_only
from vllama_jax.cli._progress import bytes_bar
from vllama_jax.cli._usage import UsageError
from vllama_jax.convert import export as exporting
from vllama_jax.io.atomic import check_absent
from vllama_jax.io.paths import require_local_output


def export(
    model: tyro.conf.Positional[Path],
    /,
    *,
    out: Path,
    format: exporting.ExportFormat = "pth",
    base: Path | None = None,
    shard_gb: float = exporting.EXPORT_SHARD_BYTES / 1e9,
) -> None:
    """Write a model or a run as files that the original's PyTorch code reads.

    Example: vllama export MODEL --out DIR

    Args:
        model: The model or run directory.
        out: The directory to create.
        format: pth writes the original's files and a Hugging Face LLaMA directory; safetensors writes all weights to
            one file.
        base: The base model of a run, if it has moved.
        shard_gb: The maximum size of a file of the LLaMA directory, in GB.
    """
    if not shard_gb > 0:
        raise UsageError(f"--shard-gb must be above 0, not {shard_gb}")
    check_absent(require_local_output(out))
    use_cpu_only()  # weights that a run trained are restored with JAX
    directory = open_model(model, base)
    files = exporting.plan_export(directory, format, shard_gb * 1e9)
    total = exporting.export_bytes(files)
    with bytes_bar(total) as progress:
        exporting.export(directory, files, out, progress)
    count = sum(map(len, files.values()))
    print(f"{out}: {count} tensors, {total / 1e6:,.1f} MB, in {', '.join(files)}")
    if directory.config.has_audio:
        print("  The four towers of ImageBind that the model does not use are missing: load it with strict=False.")
