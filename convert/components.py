"""The files that a model is made of: one table that says how each kind is identified, read, written and verified."""

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
    """The layers in a file. part: of the config. pattern: of their names. said_by: what says how many there are."""

    component: str
    pattern: str
    advice: str


@dataclasses.dataclass(frozen=True)
class FileSpec:
    """One kind of file. What reads, writes and verifies such files derives from this.

    Attributes:
        what: What it is, in messages.
        option: The command line's name for it; "" where there is none, and it is found in a directory.
        signature: A tensor that no other kind has.
        components: The paths of the components that it holds.
        rules: Its tensors → our weights.
        extras: What it holds besides (regular expressions), and why that is left out.
        infer: The fields of the model's config that its shapes tell.
        applies: Whether a model of this config has what it holds.
        branch: The branch that it holds, where that is trained; a run that trained it may be given in its place.
        fields: The fields of the model's config that are of that branch alone.
        needs: The kind of file without which it is of no use.
        layers: Where a file with too few layers is to be reported in one line.
        prefix: Of its tensors' names in the original's whole model.
        file_name: That `export` gives it, without suffix; its kind's where empty.
        bare: Whether its .pth holds the tensors themselves, and not {"model": tensors}.
        stages: What `verify` compares, as "module:function" of the model's config, since it imports torch.
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

    @property
    def display_name(self) -> str:
        """How it is named to the user: by its option, else by what it is."""
        return self.option or self.description

    @property
    def may_be_untrained(self) -> bool:
        """Whether a model may lack it before it is trained."""
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
    r"Qformer\.bert\.embeddings\.(word|position)_embeddings\..*": "text input of BERT, not used",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*": "BERT's feed-forward for text, not used",
    r"Qformer\.cls\..*": "BERT's text head, not used",
    r"(t5|opt|vision|text)_proj\..*|itm_head\..*|temp": "BLIP-2's own heads and language model projection, not used",
}

STAGES = "vllama_jax.convert.verify.stages"

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
        layers=LayerCheck("vit", r"blocks\.(\d+)\.", '--config {"vit": {"depth": …}} says'),
        prefix="visual_encoder.",
        file_name="eva_vit_g",
        bare=True,
        stages=f"{STAGES}:eva_vit_stages",
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
        layers=LayerCheck("llama", r"model\.layers\.(\d+)\.", "its config.json says"),
        prefix="llama_model.",
    ),
}


def branch_file_types() -> dict[str, str]:
    """The kinds of file that hold a trained branch, and the branch of each."""
    return {file_type: spec.branch for file_type, spec in FILE_SPECS.items() if spec.branch is not None}


def file_types_containing(component: str) -> list[str]:
    """The kinds of file that hold a component."""
    return [file_type for file_type, spec in FILE_SPECS.items() if component in spec.components]


def identify_file_types(source: Source | Collection[str]) -> list[str]:
    """The kinds that a file is, by the names of the tensors in it. A checkpoint of both branches is two; `llama_proj`
    alone is MiniGPT-4's, beside the vision branch it belongs to that."""
    file_types = [file_type for file_type, spec in FILE_SPECS.items() if spec.signature in source]
    return [file_type for file_type in file_types if file_type != "minigpt4" or "vl" not in file_types]


def strip_wrapper_prefixes(source: Source) -> Source:
    """The same tensors without what training puts before every name: "module." (DDP), "base_model.model." (peft), ….

    torch.compile's "_orig_mod." may be anywhere in a name. Where that makes it no known kind, the source as it is.
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
    note = f"{source.label}: names are read without {' and '.join(removed)}, which a wrapper put there in training"
    return rename_tensors(source, {name: kept.removeprefix(prefix) for name, kept in names.items()}, note)


def check_file_type(file_type: str, source: Source) -> None:
    """Raises CheckpointError, saying what the file is and where it belongs, when it is not of this kind."""
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
        f"(no tensor {spec.signature}; it holds {_summarize_names(source.shapes)})"
    )


def _summarize_names(names: Mapping[str, object]) -> str:
    listed = ", ".join(list(names)[:3])
    return f"{listed}, …" if len(names) > 3 else listed or "nothing"
