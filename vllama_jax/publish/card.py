"""The model card of a model on the Hugging Face Hub: its README.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import filesize

from vllama_jax.branches import get_component
from vllama_jax.checkpoints.directory import ModelDirectory
from vllama_jax.checkpoints.stored_weights import list_weights
from vllama_jax.errors import ConfigError
from vllama_jax.io.json_files import read_object

PAPER = "https://arxiv.org/abs/2306.02858"
_VIDEO_LLAMA = "Video-LLaMA: BSD-3-Clause, and for non-commercial use only by its README"
# The licenses of the published files (docs/weights.md), by the beginning of the paths of their weights.
LICENSES = {
    "vit": "EVA-CLIP: MIT",
    "ln_vision": "BLIP-2: BSD-3-Clause",
    "image_qformer": "BLIP-2: BSD-3-Clause",
    "imagebind": "ImageBind: CC BY-NC-SA 4.0, for non-commercial use only",
    "video_qformer": _VIDEO_LLAMA,
    "frame_positions": _VIDEO_LLAMA,
    "llama_proj": f"{_VIDEO_LLAMA}; MiniGPT-4: BSD-3-Clause",
    "audio_qformer": _VIDEO_LLAMA,
    "audio_positions": _VIDEO_LLAMA,
    "audio_llama_proj": _VIDEO_LLAMA,
}
LANGUAGE_MODEL_LICENSES = {
    "llama": "LLaMA and Vicuna: for non-commercial use only; LLaMA-2: Llama 2 Community License",
    "mistral": "Mistral: Apache-2.0",
    "qwen2": "Qwen: Apache-2.0, except for some sizes",
    "qwen3": "Qwen: Apache-2.0, except for some sizes",
}


def read_verification(path: Path, directory: ModelDirectory) -> dict[str, Any]:
    """Read the report that `vllama verify --against … --json` printed about a model.

    Args:
        path: The file with the report.
        directory: The model.

    Raises:
        ConfigError: The file is not such a report, is about another model, or shows differences from the PyTorch files.
    """
    report = read_object(path, ConfigError)
    if not {"logits", "components"} & report.keys():
        raise ConfigError(
            f"{path}: not a report of a comparison; write one with `vllama verify MODEL --against SOURCE --json`"
        )
    if report.get("digest") != directory.digest:
        raise ConfigError(f"{path}: a report about another model than {directory.path}; verify this one")
    if report.get("failures") or not (report.get("equal") or report.get("quantized")):
        raise ConfigError(f"{path}: the report shows differences from the PyTorch files; convert the model again")
    return report


def make_card(
    repository: str,
    directory: ModelDirectory,
    verification: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> str:
    """Write the model card of a model directory.

    Args:
        repository: "OWNER/NAME" on the hub.
        directory: The model directory.
        verification: The report of `read_verification`, if there is one.
        license: The hub's identifier of the model's license. By default "other", with the licenses of the published
            files that its components may be from.

    Returns:
        The card in Markdown, with a header in YAML.
    """
    sections = [
        _header(repository, license),
        f"# {repository.partition('/')[2]}",
        _description(directory),
        _usage(repository, directory),
        _components(directory),
        _sources(directory),
        *([_verification(verification)] if verification else []),
        _licenses(directory, license),
    ]
    return "\n\n".join(sections) + "\n"


def _header(repository: str, license: str | None) -> str:
    from huggingface_hub import ModelCardData

    named: dict[str, Any] = {"license_name": "licenses-of-components"}
    named["license_link"] = f"https://huggingface.co/{repository}#licenses"
    data = ModelCardData(
        license=license or "other",
        library_name="vllama-jax",
        pipeline_tag="video-text-to-text",
        tags=["video-llama", "jax", "flax", "video", "arxiv:2306.02858"],
        **({} if license else named),
    )
    return f"---\n{data.to_yaml()}\n---"


def _description(directory: ModelDirectory) -> str:
    config, weights = directory.config, list_weights(directory)
    media = "videos, images and audio" if config.has_audio else "videos and images"
    dtypes = " and ".join(sorted({weight.dtype for weight in weights}))
    size = sum(weight.bytes for weight in weights)
    quantized = f", quantized to {directory.quantized}" if directory.quantized else ""
    return (
        f"A [Video-LLaMA]({PAPER}) model that answers questions about {media}, as a model directory of vllama_jax "
        f"(JAX and Flax). It has {sum(weight.parameters for weight in weights):,} parameters in {dtypes}{quantized} "
        f"({filesize.decimal(size)}). Its language model is of the family {config.llama.family}, with the prompt "
        f"template `{config.template}`."
    )


def _usage(repository: str, directory: ModelDirectory) -> str:
    sound = ' "What do you hear?"' if directory.config.has_audio else ""
    return f"""## How to use

```sh
pip install vllama-jax
vllama chat clip.mp4 "What is happening?"{sound} --model hf://{repository}
vllama serve hf://{repository}
```

```python
import vllama_jax as vl

chat = vl.Chat(vl.load("hf://{repository}"))
chat.add("clip.mp4")
print("".join(chat.ask("What is happening?")))
```"""


def _components(directory: ModelDirectory) -> str:
    totals: dict[tuple[str, str], list[int]] = {}
    for weight in list_weights(directory):
        found = totals.setdefault((get_component(weight.path), weight.dtype), [0, 0])
        found[0] += weight.parameters
        found[1] += weight.bytes
    rows = [
        (f"`{component}`", f"{parameters:,}", dtype, filesize.decimal(size))
        for (component, dtype), (parameters, size) in totals.items()
    ]
    return "## Components\n\n" + _table(("component", "parameters", "dtype", "size"), rows)


def _sources(directory: ModelDirectory) -> str:
    rows = [
        (file_type, f"`{_cell(file['name'])}`", _describe_source(file))
        for file_type, files in directory.manifest["sources"].items()
        for file in files
    ]
    text = (
        f"## Sources\n\nThe xxh3_128 of each weight is in `manifest.json`; that of the model is `{directory.digest}`."
    )
    return text + (("\n\n" + _table(("type", "file or directory", "size or digest"), rows)) if rows else "")


def _describe_source(file: Mapping[str, Any]) -> str:
    known = {"size": "{:,} bytes", "digest": "xxh3_128 `{}`", "seed": "random weights of seed {}"}
    return ", ".join(text.format(file[name]) for name, text in known.items() if name in file) or "not recorded"


def _verification(report: Mapping[str, Any]) -> str:
    lines = ["## Verification", ""]
    if "logits" not in report:
        count = sum(found["tensors"] for found in report["components"])
        lines.append(f"`vllama verify --weights-only`: {count:,} tensors equal those of the PyTorch files, bit by bit.")
        return "\n".join(lines)
    logits, bounds = report["logits"], report["bounds"]
    largest: dict[str, float] = {}
    for layer in report["layers"]:
        relative = float("inf") if layer["relative"] is None else layer["relative"]
        largest[layer["component"]] = max(largest.get(layer["component"], 0.0), relative)
    rows = [(component, f"{error:.1e}") for component, error in largest.items()]
    lines += [
        "`vllama verify` ran each layer here and in PyTorch on the same random inputs.",
        "",
        _table(("component", "largest relative error of a layer"), rows),
        "",
        f"Logits of {logits['positions']:,} tokens: mean KL divergence {logits['mean_kl']:.1e}, the same most likely "
        f"token at {logits['top1']:.2%} of positions. Bounds: {bounds['relative']:.0e}, {bounds['mean_kl']:.0e}, "
        f"{bounds['top1']:.1%}.",
    ]
    return "\n".join(lines)


def _licenses(directory: ModelDirectory, license: str | None) -> str:
    if license is not None:
        return f"## Licenses\n\nThe weights are licensed under `{license}`. vllama_jax is licensed under Apache-2.0."
    known = LICENSES | {"llama": LANGUAGE_MODEL_LICENSES.get(directory.config.llama.family, "that of its authors")}
    components = dict.fromkeys(path.partition("/")[0] for path in directory.shapes)
    rows = [(f"`{component}`", known.get(component, "that of its authors")) for component in sorted(components)]
    return (
        "## Licenses\n\nA model is under the licenses of all files that it was made from: the strictest decides. The "
        "published files of each component have these; weights from other files have their own.\n\n"
        + _table(("component", "license of the published files"), rows)
        + "\n\nvllama_jax is licensed under Apache-2.0."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def _cell(text: str) -> str:
    """Return text that cannot end a table's cell or code."""
    return " ".join(text.replace("|", "\\|").replace("`", "'").split())
