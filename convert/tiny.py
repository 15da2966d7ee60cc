"""Write tiny random weights in the layouts of the published files, for tests and examples without a download.

    python -m vllama_jax.convert.tiny DIR

writes DIR/llama (a Hugging Face directory with a tokenizer), eva_vit_g, blip2, imagebind, minigpt4, vl and al as
safetensors, and config.json for `vllama convert --config`. The answers of such a model are random text.
"""

import json
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from vllama_jax.config import VideoLlamaConfig, tiny
from vllama_jax.convert.components import FILE_SPECS
from vllama_jax.convert.language_config import to_hugging_face_config
from vllama_jax.convert.match_weights import abstract_shapes, rule_tables
from vllama_jax.errors import VllamaError
from vllama_jax.io.atomic import new_directory

VOCAB_SIZE = 512
TinyFormat = Literal["safetensors", "pth"]


def write_tiny(
    out: str | Path,
    *,
    config: VideoLlamaConfig | None = None,
    format: TinyFormat = "safetensors",
    half: bool = False,
    seed: int = 0,
) -> dict[str, Path]:
    """Write all files of a model with tiny random weights.

    No tensor is constant, so that tests detect swapped or missing tensors.

    Args:
        out: The directory to create.
        config: The dimensions, by default `config.tiny()`. Without an audio branch, ImageBind is not written either.
        format: The file format of all weights but LLaMA's, which are safetensors. "pth" needs torch.
        half: Whether EVA's weights are float16 and LLaMA's bfloat16, as published. Others are float32.
        seed: The seed of the weights.

    Returns:
        The paths by file type ("llama", "eva_vit", …), and that of config.json as "config".

    Raises:
        CheckpointError: `out` exists or cannot be written.
    """
    out, config = Path(out), config or tiny(vocab_size=VOCAB_SIZE)
    names = {"eva_vit": "eva_vit_g", "llama": "llama/model"}
    with new_directory(out) as directory:
        (directory / "llama").mkdir()
        paths = {}
        for file_type, shapes in file_shapes(config).items():
            tensors = {name: random_tensor(f"{file_type}/{name}", shape, seed) for name, shape in shapes.items()}
            if half and file_type in ("eva_vit", "llama"):
                dtype = np.float16 if file_type == "eva_vit" else ml_dtypes.bfloat16
                tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
            path = directory / names.get(file_type, file_type)
            paths[file_type] = write_tensors(path, tensors, "safetensors" if file_type == "llama" else format)
        paths["llama"] = directory / "llama"
        paths["config"] = write_overrides(directory / "config.json", config)
        write_llama_config(directory / "llama" / "config.json", config)
        train_tokenizer(directory / "llama", min(config.llama.vocab_size, VOCAB_SIZE))
    return {file_type: out / path.relative_to(directory) for file_type, path in paths.items()}


def file_shapes(config: VideoLlamaConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return names and shapes of the tensors of each file type: those of the rules, and some that are not used."""
    file_types = [
        file_type for file_type, spec in FILE_SPECS.items() if spec.applies(config) and file_type != "minigpt4"
    ]
    shapes = abstract_shapes(config)
    files = {}
    for file_type, rules in {**rule_tables(config, file_types), **rule_tables(config, ["minigpt4"])}.items():
        files[file_type] = _unused_shapes(file_type, config)
        for rule in rules:
            for names in rule.names():
                files[file_type] |= dict(zip(names, rule.source_shapes(shapes[rule.target]), strict=True))
    return files


def random_tensor(name: str, shape: Iterable[int], seed: int = 0) -> np.ndarray:
    """Draw a normal tensor, seeded by its name and scaled so that it affects the output. Norm scales are around 1."""
    shape = tuple(shape)
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    is_norm = "norm" in name.lower() or name.endswith(".0.weight")
    if name.endswith("log_logit_scale"):
        return np.log(np.float32(20)) + np.zeros(shape, np.float32)
    if len(shape) == 1 and name.endswith("weight") and is_norm:
        return 1 + 0.1 * values
    if len(shape) < 2:
        return 0.1 * values
    if "embed_tokens" in name or "query_tokens" in name:
        return 0.5 * values
    if 1 in shape or "position" in name:  # class tokens, position tables, extra keys and values
        return 0.3 * values
    return values / np.sqrt(np.float32(np.prod(shape[1:])))


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], format: TinyFormat) -> Path:
    """Write a file of tensors, a `.pth` as {"model": tensors}. The suffix of `path` is replaced by the format."""
    path = path.with_suffix(f".{format}")
    if format == "safetensors":
        from safetensors.numpy import save_file

        save_file({name: np.array(tensor, order="C") for name, tensor in tensors.items()}, path)
    else:
        import torch

        state_dict = {name: torch.from_numpy(np.array(tensor, order="C")) for name, tensor in tensors.items()}
        torch.save({"model": state_dict}, path)
    return path


def _unused_shapes(file_type: str, config: VideoLlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return tensors that published files have and no rule needs, such as EVA's last block and head."""
    width = config.vit.width
    if file_type == "eva_vit":
        return {f"blocks.{config.vit.depth}.norm1.weight": (width,), "norm.weight": (width,), "head.weight": (8, width)}
    if file_type == "imagebind":
        scale = "modality_postprocessors.audio.1.log_logit_scale"
        return {scale: (), "modality_trunks.text.blocks.0.norm_1.weight": (8,)}
    return {}


def write_overrides(path: Path, config: VideoLlamaConfig) -> Path:
    """Write a --config file with what shapes do not determine: head counts, and the number of EVA's blocks."""
    qformers = ["image_qformer", "video_qformer", *(["audio_qformer"] if config.has_audio else [])]
    fields = {name: {"num_heads": getattr(config, name).num_heads} for name in ("vit", *qformers)}
    fields["vit"]["depth"] = config.vit.depth
    if config.has_audio:
        imagebind = config.require_imagebind()
        heads = {"audio": imagebind.audio.num_heads, "vision": imagebind.vision.num_heads}
        fields["imagebind"] = {modality: {"num_heads": number} for modality, number in heads.items()}
    path.write_text(json.dumps(fields, indent=1))
    return path


def write_llama_config(path: Path, config: VideoLlamaConfig) -> None:
    """Write the config.json of the language model."""
    fields = {**to_hugging_face_config(config.llama), "bos_token_id": 1, "eos_token_id": 2}
    path.write_text(json.dumps(fields, indent=1))


TEXT = (
    "The video shows a dog that runs over the grass and barks at a red ball.",
    "A boy blows the candles on a cake while his friends sing and clap their hands.",
    "What can you hear in this video? I can hear the engine of a boat and the wind over the water.",
    "The picture was taken at noon: there are three people, two bicycles and one small yellow bird.",
    "Close your eyes, open your ears. Which sound comes first, the bell or the drum?",
    "###Human: Describe what happens, in detail. ###Assistant: A girl talks to the camera and smiles.",
)


def train_tokenizer(directory: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Train a SentencePiece tokenizer with LLaMA's special tokens and byte fallback on a few sentences."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()


def main(arguments: Sequence[str]) -> None:
    """Run `python -m vllama_jax.convert.tiny`."""
    usage = "usage: python -m vllama_jax.convert.tiny DIR"
    if list(arguments) in (["-h"], ["--help"]):
        print(f"{usage}\n\n{__doc__}")
    elif len(arguments) != 1 or arguments[0].startswith("-"):
        print(usage, file=sys.stderr)
        sys.exit(2)
    else:
        try:
            write_tiny(arguments[0])
        except VllamaError as error:
            sys.exit(f"vllama: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
