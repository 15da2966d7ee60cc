"""Plan a conversion, then write the model directory.

A plan is complete before tensor data is read: it has a source for every weight, and all shapes fit.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllama_jax.branches import get_component
from vllama_jax.checkpoints.arrays import ParamsWriter
from vllama_jax.checkpoints.directory import write_config, write_manifest
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.convert.components import (
    FILE_SPECS,
    branch_file_types,
    check_file_type,
    file_types_containing,
    strip_wrapper_prefixes,
)
from vllama_jax.convert.discover import SearchResult, find_weight_files
from vllama_jax.convert.families import find_family
from vllama_jax.convert.from_model_directory import (
    ModelDirectoryLeaf,
    StoredLeaf,
    StoredModel,
    collect_stored_leaves,
    describe_sources,
    frozen_differences,
    is_model_or_run,
    known_config_fields,
    open_model_or_run,
)
from vllama_jax.convert.infer_config import infer_model_config
from vllama_jax.convert.language import LanguageModel, open_language_model
from vllama_jax.convert.match_weights import Leaf, match_weights
from vllama_jax.convert.new_weights import SEED, drop_components, new_components
from vllama_jax.convert.published import download_published
from vllama_jax.convert.weight_files import Source, open_file
from vllama_jax.convert.write_tensors import BytesProgress
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.atomic import new_directory, write_file
from vllama_jax.io.hub import resolve_hub_path
from vllama_jax.io.paths import as_path, require_local


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """A checked conversion. The tensor data is not read yet.

    Attributes:
        config: The config of the new model.
        leaves: The weights from PyTorch files.
        stored: The weights from model directories and runs, and new random weights.
        left_out: The number of tensors of the files that are not used, by reason.
        sources: The PyTorch files by file type, a key of `FILE_SPECS`.
        tokenizer_directory: The directory to copy the tokenizer from.
        notes: Lines for the user, for example which file of a directory is used for what.
        other_sources: The manifest entries of model directories, runs and new weights.
        new: The components with new random weights.
    """

    config: VideoLlamaConfig
    leaves: list[Leaf]
    stored: list[StoredLeaf]
    left_out: dict[str, int]
    sources: dict[str, Source]
    tokenizer_directory: Path
    notes: list[str]
    other_sources: dict[str, Any]
    new: tuple[str, ...] = ()

    @property
    def all_leaves(self) -> list[Leaf | StoredLeaf]:
        """All weights of the new model, sorted by path."""
        return sorted([*self.leaves, *self.stored], key=lambda leaf: leaf.target)


def plan(
    *,
    directory: str | Path | None = None,
    llama_directory: str | Path | None = None,
    delta: str | Path | None = None,
    files: Mapping[str, str | Path | None],
    base: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    template: str | None = None,
    without: Sequence[str] = (),
    seed: int = SEED,
    published_encoders: bool = False,
) -> ConversionPlan:
    """Plan a conversion: find the source of every weight of a model, and check all names and shapes.

    Every path may be an address on the Hugging Face hub: hf://org/name, hf://org/name/file.

    Args:
        directory: A directory to search for weight files, identified by their tensors. File types that other arguments
            provide are not taken from it.
        llama_directory: The directory of the language model, in Hugging Face's or Meta's layout.
        delta: The directory of a language model released as a difference to `llama_directory`. The tokenizer and the
            config are taken from it.
        files: Paths by file type, a key of `FILE_SPECS` other than "llama". "vl" and "al" may be runs or model
            directories.
        base: A model directory or a run that provides all other components. Without it, the language model, "eva_vit"
            and "blip2" are required.
        config: Fields of the model config, which take precedence over those inferred from the files.
        template: The prompt template. By default that of `config`, else that of `base`, unless another family of
            language models replaces its language model, else the default of the family.
        without: Components of `base`, such as "video_qformer", to replace with new random weights in the shapes of
            the new config. They need not exist in `base`.
        seed: The seed of the new weights.
        published_encoders: Download the files of the ViT and of the image Q-Former that no argument provides from
            where they are published (`FileSpec.url`).

    Returns:
        The plan, for `convert`.

    Raises:
        CheckpointError: Tensors are missing, have wrong shapes or are not used; the message lists them. Or a file
            cannot be read.
        ConfigError: The arguments do not fit together, or a field of `config` is unknown or invalid.
    """
    from vllama_jax.text.prompts import check_special_tokens
    from vllama_jax.text.templates import find_template
    from vllama_jax.text.tokenizer import check_vocabulary, load_tokenizer

    model = open_model_or_run(as_path(base)) if base else None
    drop_components(model, without)
    given = {file_type: resolve_hub_path(path) for file_type, path in files.items() if path is not None}
    directory, llama_directory, delta = (
        require_local(resolve_hub_path(path), CheckpointError) if path else None
        for path in (directory, llama_directory, delta)
    )
    found = _search_directory(directory, given, llama_directory)
    branches = {
        file_type: open_model_or_run(path, model.path if model else None)
        for file_type, path in given.items()
        if file_type in branch_file_types() and is_model_or_run(path)
    }
    language = open_language_model(llama_directory or found.llama, delta)
    sources = found.files | _open_files(
        {file_type: path for file_type, path in given.items() if file_type not in branches}
    )
    sources |= {"llama": language.source} if language else {}
    if published_encoders:
        sources |= _open_files(_download_missing_encoders([*sources, *branches], model))
    _check_complete([*sources, *branches], model, directory)
    for file_type, source in sources.items():
        check_file_type(file_type, source)
    known = known_config_fields(model, branches)
    override = {"template": _default_template(language, known), **(config or {})}
    override |= {"template": template} if template else {}
    cfg = infer_model_config(sources, language.fields if language else {}, override, known)
    tokenizer_directory = _tokenizer_directory(language, model)
    tokenizer = load_tokenizer(tokenizer_directory)
    check_special_tokens(find_template(cfg.template), tokenizer, cfg.template)
    check_vocabulary(tokenizer, cfg.llama.vocab_size)
    leaves, left_out = match_weights(cfg, sources, branches)
    new = new_components(cfg, without, seed)
    kept = collect_stored_leaves(cfg, model, branches, {get_component(leaf.target) for leaf in leaves})
    _check_new_components(without, [*leaves, *kept])
    source_notes = dict.fromkeys(note for source in sources.values() for note in source.notes)
    notes = [*found.notes, *source_notes, *frozen_differences(model, branches)]
    other_sources = describe_sources(model, branches, [*sources, *_replaced_file_types(cfg, without)])
    other_sources |= {"new": [{"name": component, "seed": seed} for component in without]} if without else {}
    return ConversionPlan(
        cfg,
        leaves,
        [*kept, *new],
        left_out,
        sources,
        tokenizer_directory,
        notes,
        other_sources,
        tuple(dict.fromkeys(without)),
    )


def _check_new_components(without: Sequence[str], given: Sequence[Leaf | StoredLeaf]) -> None:
    """Raise ConfigError for a component of `without` that a file or run also provides."""
    if both := {get_component(leaf.target) for leaf in given} & {*without}:
        raise ConfigError(f"--without {min(both)}: a file or run provides this component; leave one of the two out")


def _replaced_file_types(cfg: VideoLlamaConfig, without: Sequence[str]) -> list[str]:
    """Return the file types all of whose components are in `without`."""
    rule_tables = {file_type: spec.rules(cfg) for file_type, spec in FILE_SPECS.items() if spec.applies(cfg)}
    return [
        file_type
        for file_type, rules in rule_tables.items()
        if {get_component(rule.target) for rule in rules} <= {*without}
    ]


def _default_template(language: LanguageModel | None, known: Mapping[str, Any]) -> str:
    """Return the base's template, or that of the language model's family if the base's model is of another one."""
    if language is None or ("llama" in known and known["llama"]["family"] == language.fields["family"]):
        return known["template"]
    return find_family(language.fields["family"]).template


def _tokenizer_directory(language: LanguageModel | None, base: StoredModel | None) -> Path:
    if language:
        return language.tokenizer
    assert base is not None  # checked by `_check_complete`
    return base.directory.tokenizer_directory


def _search_directory(directory: Path | None, given: Mapping[str, Path], llama_directory: Path | None) -> SearchResult:
    """Find the weight files of a directory whose types are not given by name."""
    if unknown := given.keys() - FILE_SPECS.keys() | given.keys() & {"llama"}:
        raise ConfigError(f"unknown file type: {', '.join(sorted(unknown))}; known types are {', '.join(FILE_SPECS)}")
    if directory and directory.is_file():
        raise CheckpointError(f"{directory}: not a directory; give the directory of the weight files")
    given_types = [*given, *(["llama"] if llama_directory else [])]
    return find_weight_files([directory] if directory else [], given_types)


def _open_files(given: Mapping[str, Path]) -> dict[str, Source]:
    # One file may be of two types. It is opened once.
    opened = {path: strip_wrapper_prefixes(open_file(path)) for path in dict.fromkeys(given.values())}
    return {file_type: opened[path] for file_type, path in given.items()}


def _download_missing_encoders(file_types: Sequence[str], base: StoredModel | None) -> dict[str, Path]:
    """Download the published files of components that are missing. Return their paths by file type."""
    if base:
        return {}
    present = {component for file_type in file_types for component in FILE_SPECS[file_type].components}
    return {
        file_type: download_published(spec.url)
        for file_type, spec in FILE_SPECS.items()
        if spec.url and not present & {*spec.components}
    }


def _check_complete(file_types: Sequence[str], base: StoredModel | None, directory: str | Path | None) -> None:
    """Raise ConfigError for a required component that no file contains, or that two files contain."""
    choices = [file_types_containing(component) for component in ("llama", "vit", "image_qformer")]
    missing = [choice for choice in choices if not base and not set(choice) & set(file_types)]
    if missing:
        where = f"; {directory} contains none" if directory else ""
        options = ", ".join(
            " or ".join(FILE_SPECS[file_type].display_name for file_type in choice) for choice in missing
        )
        raise ConfigError(f"every model needs {options}{where}")
    for choice in choices:
        if len(given := [file_type for file_type in choice if file_type in file_types]) > 1:
            names = " and ".join(FILE_SPECS[file_type].display_name for file_type in given)
            raise ConfigError(f"{names} contain the same component of the model; leave one of them out")
    for spec in (FILE_SPECS[file_type] for file_type in file_types if FILE_SPECS[file_type].needs):
        if spec.needs not in file_types and not (base and FILE_SPECS[spec.needs].applies(base.directory.config)):
            needed = FILE_SPECS[spec.needs].display_name
            raise ConfigError(
                f"{spec.display_name} needs {needed}, which encodes the input of the {spec.branch} branch"
            )


def convert(
    plan: ConversionPlan, out: str | Path, *, dtype: str | None = None, progress: BytesProgress = lambda done: None
) -> None:
    """Write the model directory that `plan` describes.

    It is written under a temporary name and renamed to `out` when it is complete.

    Args:
        plan: What `plan(...)` returned.
        out: The model directory to create.
        dtype: The dtype of the weights on disk, "float32", "bfloat16" or "float16". By default each weight keeps the
            dtype of its source.
        progress: Called with the number of bytes written since the last call.

    Raises:
        CheckpointError: `out` exists or cannot be written, a source cannot be read, or a value is too large for
            `dtype`.

    Example:
        >>> import json
        >>> import vllama_jax as vl
        >>> from vllama_jax.convert.tiny import write_tiny
        >>> files = write_tiny("weights")  # random weights in the layouts of the published files
        >>> heads = json.loads(files.pop("config").read_text())
        >>> plan = vl.convert.plan(llama_directory=files.pop("llama"), files=files, config=heads)
        >>> vl.convert.convert(plan, "model")
        >>> model = vl.load("model")

        The same model with a new video Q-Former of 48 queries:

        >>> changed = {"video_qformer": {"num_queries": 48}}
        >>> plan = vl.convert.plan(files={}, base="model", config=changed, without=["video_qformer"])
        >>> vl.convert.convert(plan, "changed")
        >>> vl.load("changed").network.video_qformer.queries.shape
        (48, 48)
    """
    with new_directory(as_path(out)) as directory:
        with ParamsWriter(directory / "params") as params:
            for leaf in plan.all_leaves:
                target = np.dtype(dtype) if dtype else leaf.dtype
                if isinstance(leaf, ModelDirectoryLeaf) and leaf.dtype == target:
                    params.copy(leaf.target, leaf.params, leaf.entry)
                    progress(math.prod(leaf.shape) * target.itemsize)
                else:
                    params.write(leaf.target, leaf.shape, target, _report_bytes(leaf.blocks(target), progress))
        _copy_tokenizer(plan.tokenizer_directory, directory / "tokenizer")
        write_config(directory, plan.config)
        files = {
            file_type: [_describe_file(file) for file in source.files] for file_type, source in plan.sources.items()
        }
        write_manifest(directory, plan.other_sources | files, params.leaves)


def bytes_to_write(plan: ConversionPlan, dtype: str | None = None) -> int:
    """Return the number of bytes of weights that `convert` writes, for a progress bar."""
    return sum(math.prod(leaf.shape) * np.dtype(dtype or leaf.dtype).itemsize for leaf in plan.all_leaves)


def _report_bytes(blocks: Iterator[np.ndarray], progress: BytesProgress) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block
        progress(block.nbytes)


def _copy_tokenizer(directory: Path, out: Path) -> None:
    from vllama_jax.text.tokenizer import tokenizer_files

    out.mkdir()
    for file in tokenizer_files(directory):
        write_file(out / file.name, file.read_bytes())


def _describe_file(file: Path) -> dict[str, Any]:
    return {"name": file.name, "size": file.stat().st_size}
