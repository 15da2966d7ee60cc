"""The types of weight files: one table that defines how each type is identified, read, exported and verified.

A key of `FILE_SPECS` is a *file type*, such as "eva_vit" or "vl". One file may be of several types: a checkpoint of
both branches is of the types "vl" and "al".
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vllama_jax.branches import BRANCHES, list_trainable_components
from vllama_jax.config import VideoLlamaConfig
from vllama_jax.convert import eva_vit, imagebind, qformer
from vllama_jax.convert.families import find_family
from vllama_jax.convert.rules import IDENTITY, Rule, linear, norm
from vllama_jax.convert.weight_files import Source, rename_tensors
from vllama_jax.errors import CheckpointError
from vllama_jax.towers import VitConfig


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """How to report a file with fewer layers than the config has.

    Attributes:
        component: The field of VideoLlamaConfig whose `depth` is expected.
        pattern: A regular expression on tensor names. Its first group is the layer number.
        advice: What the user can change, for the error message.
    """

    component: str
    pattern: str
    advice: str


@dataclasses.dataclass(frozen=True)
class FileSpec:
    """A type of weight file. Conversion, export and verification read this.

    Attributes:
        description: The file type, as messages name it.
        option: Its command line option. "" if it has none; such a file is only found in a directory.
        signature: The name of a tensor that no other file type has.
        components: The paths of the components in the file.
        rules: (model config) → the rule table, from tensors of the file to parameters.
        unused_tensors: (model config) → regular expressions on names of known tensors that are not converted, each with
            the reason.
        infer: (tensors) → the config fields that their shapes determine.
        applies: (model config) → whether such a model has these components.
        branch: The name of the trained branch in the file, if any. A run that trained it is accepted in its place.
        fields: The config fields that belong to this branch only.
        needs: Another file type that the model needs with this one.
        layers: How to report a file with too few layers; None to list its missing tensors.
        prefix: The prefix of its tensors in the original's complete model.
        file_name: The name of an exported file, without suffix; "" for the file type.
        bare: Whether its .pth is the state dict itself, not {"model": state dict}.
        stages: "module:function" that makes the stages for `verify`; a string, because the module imports torch.
        url: Where the file is published, if `convert --published-encoders` may download it.
    """

    description: str
    option: str
    signature: str
    components: tuple[str, ...]
    rules: Callable[[VideoLlamaConfig], list[Rule]]
    unused_tensors: Callable[[VideoLlamaConfig], dict[str, str]]
    infer: Callable[[Source], dict[str, Any]]
    applies: Callable[[VideoLlamaConfig], bool] = lambda cfg: True
    branch: str | None = None
    fields: tuple[str, ...] = ()
    needs: str = ""
    layers: LayerCheck | None = None
    prefix: str = ""
    file_name: str = ""
    bare: bool = False
    stages: str = ""
    url: str = ""

    @property
    def display_name(self) -> str:
        """The option, or the description of a file type without one, for messages."""
        return self.option or self.description

    @property
    def may_be_untrained(self) -> bool:
        """Whether a model is complete without it, because training creates its components."""
        return set(self.components) <= {*list_trainable_components()}


def _blip2_rules(cfg: VideoLlamaConfig) -> list[Rule]:
    table = qformer.rules("image_qformer", "Qformer", "query_tokens", cfg.image_qformer)
    return [*table, *norm("ln_vision", "ln_vision")]


def _vl_rules(cfg: VideoLlamaConfig) -> list[Rule]:
    return [
        *qformer.rules("video_qformer", "video_Qformer", "video_query_tokens", cfg.video_qformer),
        Rule("frame_positions", ("video_frame_position_embedding.weight",), IDENTITY),
        *linear("llama_proj", "llama_proj"),
    ]


def _al_rules(cfg: VideoLlamaConfig) -> list[Rule]:
    return [
        *qformer.rules("audio_qformer", "audio_Qformer", "audio_query_tokens", cfg.require_audio_qformer()),
        Rule("audio_positions", ("audio_position_embedding.weight",), IDENTITY),
        *linear("audio_llama_proj", "audio_llama_proj"),
    ]


_UNUSED_BERT_TENSORS = {
    r"Qformer\.bert\.embeddings\.(word|position)_embeddings\..*": "BERT's text embeddings, not used",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*": "BERT's feed-forward layers for text, not used",
    r"Qformer\.cls\..*": "BERT's text head, not used",
    r"(t5|opt|vision|text)_proj\..*|itm_head\..*|temp": "BLIP-2's own heads and language model projection, not used",
}

STAGES = "vllama_jax.convert.verify.stages"
LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"

FILE_SPECS: dict[str, FileSpec] = {
    "eva_vit": FileSpec(
        "EVA-CLIP ViT-g weights",
        "--eva-vit",
        "blocks.0.attn.q_bias",
        ("vit",),
        lambda cfg: eva_vit.rules(cfg.vit),
        lambda cfg: eva_vit.unused_tensors(cfg.vit),
        lambda source: {"vit": eva_vit.infer(source)},
        applies=lambda cfg: type(cfg.vit) is VitConfig,
        layers=LayerCheck("vit", r"blocks\.(\d+)\.", 'set --config {"vit": {"depth": …}}'),
        prefix="visual_encoder.",
        file_name="eva_vit_g",
        bare=True,
        stages=f"{STAGES}:eva_vit_stages",
        url=f"{LAVIS}/eva_vit_g.pth",
    ),
    "blip2": FileSpec(
        "BLIP-2 Q-Former weights",
        "--blip2",
        "query_tokens",
        ("image_qformer", "ln_vision"),
        _blip2_rules,
        lambda _: _UNUSED_BERT_TENSORS,
        lambda source: {"image_qformer": qformer.infer(source, "Qformer", "query_tokens")},
        stages=f"{STAGES}:image_qformer_stages",
        url=f"{LAVIS}/blip2_pretrained_flant5xxl.pth",
    ),
    "imagebind": FileSpec(
        "ImageBind weights",
        "--imagebind",
        "modality_trunks.audio.blocks.0.norm_1.weight",
        ("imagebind/audio", "imagebind/vision"),
        lambda cfg: imagebind.rules(cfg.require_imagebind()),
        lambda _: {**imagebind.UNUSED_TENSORS, re.escape(imagebind.AUDIO_SCALE): "kept in config.json"},
        lambda source: {"imagebind": imagebind.infer(source)},
        applies=lambda cfg: cfg.has_audio,
        prefix="audio_encoder.",
        bare=True,
        stages=f"{STAGES}:imagebind_stages",
    ),
    "vl": FileSpec(
        "a Video-LLaMA vision-language checkpoint",
        "--vl",
        "video_query_tokens",
        BRANCHES["vision"].trainable_components,
        _vl_rules,
        lambda cfg: {rf"audio_{'(?!encoder)' * cfg.has_audio}.*": "the audio branch; give the file as --al too"},
        lambda source: {
            "video_qformer": qformer.infer(source, "video_Qformer", "video_query_tokens"),
            "num_frame_positions": source.shape("video_frame_position_embedding.weight", 2)[0],
        },
        branch="vision",
        fields=("video_qformer", "num_frame_positions"),
        stages=f"{STAGES}:vision_branch_stages",
    ),
    "al": FileSpec(
        "a Video-LLaMA audio-language checkpoint",
        "--al",
        "audio_query_tokens",
        BRANCHES["audio"].trainable_components,
        _al_rules,
        lambda _: {r"video_.*|llama_proj\..*": "the vision branch; give the file as --vl too"},
        lambda source: {
            "audio_qformer": qformer.infer(source, "audio_Qformer", "audio_query_tokens"),
            "num_clip_positions": source.shape("audio_position_embedding.weight", 2)[0],
        },
        applies=lambda cfg: cfg.has_audio,
        branch="audio",
        fields=("audio_qformer", "num_clip_positions"),
        needs="imagebind",
        stages=f"{STAGES}:audio_branch_stages",
    ),
    "minigpt4": FileSpec(
        "a MiniGPT-4 projection",
        "--minigpt4",
        "llama_proj.weight",
        ("llama_proj",),
        lambda _: linear("llama_proj", "llama_proj"),
        lambda _: {},
        lambda _: {},
    ),
    "llama": FileSpec(
        "LLaMA weights",
        "--llama",
        "model.embed_tokens.weight",
        ("llama",),
        lambda cfg: find_family(cfg.llama.family).rules(cfg.llama),
        lambda cfg: find_family(cfg.llama.family).unused_tensors(cfg.llama),
        lambda source: {"llama": {"vocab_size": source.shape("model.embed_tokens.weight", 2)[0]}},
        layers=LayerCheck("llama", r"model\.layers\.(\d+)\.", "check num_hidden_layers in its config.json"),
        prefix="llama_model.",
    ),
}


def branch_file_types() -> dict[str, str]:
    """Return the file types that contain a trained branch, each with the name of the branch."""
    return {file_type: spec.branch for file_type, spec in FILE_SPECS.items() if spec.branch is not None}


def file_types_containing(component: str) -> list[str]:
    """Return the file types that contain a component."""
    return [file_type for file_type, spec in FILE_SPECS.items() if component in spec.components]


def identify_file_types(source: Source | Collection[str]) -> list[str]:
    """Identify the types of a file by its tensor names.

    A checkpoint of both branches has two types. `llama_proj` belongs to "vl" if the file has a vision branch, and
    otherwise to "minigpt4".

    Args:
        source: The tensors of the file, or their names.

    Returns:
        The file types, in the order of `FILE_SPECS`; empty for an unknown file.
    """
    file_types = [file_type for file_type, spec in FILE_SPECS.items() if spec.signature in source]
    return [file_type for file_type in file_types if file_type != "minigpt4" or "vl" not in file_types]


def strip_wrapper_prefixes(source: Source) -> Source:
    """Remove the prefixes that training wrappers add to tensor names.

    Removed are prefixes that all names have, such as "module." (DDP) or "base_model.model." (peft), and "_orig_mod."
    (torch.compile) anywhere in a name.

    Returns:
        The source with renamed tensors and a note for the user, or the same source if its type is unknown even without
        prefixes.
    """
    names = {name: name.replace("_orig_mod.", "") for name in source.shapes}
    prefix = ""
    while not identify_file_types(stripped := {name.removeprefix(prefix) for name in names.values()}):
        first = {name.partition(".")[0] for name in stripped if "." in name}
        if len(first) != 1 or not all("." in name for name in stripped):
            return source
        prefix += f"{first.pop()}."
    removed = [prefix] * bool(prefix) + ["_orig_mod."] * any(name != kept for name, kept in names.items())
    if not removed:
        return source
    note = f"{source.label}: removed {' and '.join(removed)} from tensor names, added by a wrapper in training"
    return rename_tensors(source, {name: kept.removeprefix(prefix) for name, kept in names.items()}, note)


def check_file_type(file_type: str, source: Source) -> None:
    """Check that a file is of a type.

    Raises:
        CheckpointError: It is not. The message names its type and the option to use.
    """
    found = identify_file_types(source)
    if file_type in found:
        return
    spec = FILE_SPECS[file_type]
    if found:
        other = FILE_SPECS[found[0]]
        raise CheckpointError(
            f"{source.label}: given as {spec.display_name}, but it is {other.description}; give it as "
            f"{other.display_name}"
        )
    raise CheckpointError(
        f"{source.label}: given as {spec.display_name}, but it is not {spec.description} "
        f"(no tensor {spec.signature}; it contains {_summarize_names(source.shapes)})"
    )


def _summarize_names(names: Mapping[str, object]) -> str:
    listed = ", ".join(list(names)[:3])
    return f"{listed}, …" if len(names) > 3 else listed or "no tensors"
