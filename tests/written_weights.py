"""Weight files in their published layouts, and files that are not weights."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file


def save_torch(tensors: dict[str, np.ndarray], path: Path, **options) -> None:
    torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, path, **options)


def save_legacy_torch(tensors: dict[str, np.ndarray], path: Path) -> None:
    save_torch(tensors, path, _use_new_zipfile_serialization=False)


def as_single_file(name: str, save):
    return lambda tensors, directory: save(tensors, directory / name)


def as_shards(pattern: str, index: str, save):
    def write(tensors: dict[str, np.ndarray], directory: Path) -> None:
        files = {name: pattern.format(1 + number % 3) for number, name in enumerate(tensors)}
        for shard in set(files.values()):
            save({name: tensors[name] for name in files if files[name] == shard}, directory / shard)
        (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))

    return write


LAYOUTS = {
    "single bin": as_single_file("pytorch_model.bin", save_torch),
    "single bin from before torch 1.6": as_single_file("pytorch_model.bin", save_legacy_torch),
    "safetensors named bin": as_single_file("pytorch_model.bin", save_file),
    "bin shards": as_shards("pytorch_model-{}.bin", "pytorch_model.bin.index.json", save_torch),
    "old bin shards": as_shards("pytorch_model-{}.bin", "pytorch_model.bin.index.json", save_legacy_torch),
    "safetensors shards": as_shards("model-{}.safetensors", "model.safetensors.index.json", save_file),
}


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


class Hostile:
    def __init__(self, marker: Path):
        self._marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self._marker}'",)
