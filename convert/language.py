"""Open a language model in Hugging Face's or Meta's layout, complete or as a delta."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from vllama_jax.convert import language_config, meta_llama
from vllama_jax.convert.components import strip_wrapper_prefixes
from vllama_jax.convert.delta import open_delta
from vllama_jax.convert.weight_files import Source, open_llama
from vllama_jax.errors import ConfigError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """An opened language model.

    Attributes:
        source: Its tensors, under Hugging Face's names.
        fields: The fields of LlamaConfig that its config determines.
        tokenizer: The directory of its tokenizer.
    """

    source: Source
    fields: dict[str, Any]
    tokenizer: Path


def open_language_model(directory: Path | None, delta: Path | None) -> LanguageModel | None:
    """Open a language model.

    Args:
        directory: Its directory, or that of the base of `delta`.
        delta: The directory of a language model released as a difference, if any.

    Returns:
        The language model, or None if no directory is given.

    Raises:
        CheckpointError: A directory is not a language model or lacks files, or the delta does not fit the base.
        ConfigError: The config is of an unsupported architecture, or a delta is given without a base.
    """
    if directory is None and delta is None:
        return None
    if directory is None:
        raise ConfigError(f"--delta needs --llama, the language model that {delta} is added to")
    if delta is None:
        return _check_tied_head(_open_directory(directory, "--llama"))
    base, added = _open_directory(directory, "--llama"), _open_directory(delta, "--delta")
    return _check_tied_head(dataclasses.replace(added, source=open_delta(base.source, added.source)))


def _check_tied_head(model: LanguageModel) -> LanguageModel:
    """Untie the head if the files contain one that differs from the embeddings, as transformers 5 does."""
    source = model.source
    if not model.fields["tie_embeddings"] or HEAD not in source or EMBEDDING not in source:
        return model
    embedding, head = source.read(EMBEDDING), source.read(HEAD)
    if embedding.shape == head.shape and np.array_equal(embedding, head):
        return model
    source.notes.append(
        f"{source.label}: ignored tie_word_embeddings of its config.json; {HEAD} differs from the embeddings"
    )
    return dataclasses.replace(model, fields=model.fields | {"tie_embeddings": False})


def is_language_model(directory: Path) -> bool:
    """Whether a directory is a language model with its weights, in either layout."""
    return language_config.is_hugging_face(directory) or meta_llama.is_meta(directory)


def is_language_model_file(name: str) -> bool:
    """Whether a file in such a directory belongs to the language model, by its name."""
    return language_config.is_hugging_face_file(name) or bool(meta_llama.SHARD.fullmatch(name)) or name.endswith(".chk")


def _open_directory(directory: Path, option: str) -> LanguageModel:
    if meta_llama.is_meta(directory) and not (directory / "config.json").exists():
        source = strip_wrapper_prefixes(meta_llama.open_meta(directory))
        fields = meta_llama.llama_fields(meta_llama.read_params(directory), source)
        return LanguageModel(source, fields, meta_llama.tokenizer_directory(directory))
    fields = language_config.read_llama_config(directory, option)
    return LanguageModel(strip_wrapper_prefixes(open_llama(directory)), fields, directory)
