"""The files that a model is made of: which is which, told by what they hold, and which rules read them."""

import dataclasses
import re
from collections.abc import Callable, Container, Mapping

from vllama_jax.config import VideoLlamaConfig
from vllama_jax.convert import eva_vit, imagebind, qformer
from vllama_jax.convert.families import find_family
from vllama_jax.convert.rules import SAME, Rule, linear, norm
from vllama_jax.convert.weight_files import Source, renamed
from vllama_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Piece:
    """One kind of file.

    option: the command line's name for it. signature: a tensor that no other kind has. rules: what it gives.
    extras: what it holds besides (regular expressions), and why that is left out.
    """

    what: str
    option: str
    signature: str
    rules: Callable[[VideoLlamaConfig], list[Rule]]
    extras: Callable[[VideoLlamaConfig], dict[str, str]]


def _blip2(cfg: VideoLlamaConfig) -> list[Rule]:
    table = qformer.rules("image_qformer", "Qformer", "query_tokens", cfg.image_qformer)
    return [*table, *norm("ln_vision", "ln_vision")]


def _vl(cfg: VideoLlamaConfig) -> list[Rule]:
    return [
        *qformer.rules("video_qformer", "video_Qformer", "video_query_tokens", cfg.video_qformer),
        Rule("frame_positions", ("video_frame_position_embedding.weight",), SAME),
        *linear("llama_proj", "llama_proj"),
    ]


def _al(cfg: VideoLlamaConfig) -> list[Rule]:
    return [
        *qformer.rules("audio_qformer", "audio_Qformer", "audio_query_tokens", cfg.audio_qformer),
        Rule("audio_positions", ("audio_position_embedding.weight",), SAME),
        *linear("audio_llama_proj", "audio_llama_proj"),
    ]


_BERT_TEXT = {
    r"Qformer\.bert\.embeddings\.(word|position)_embeddings\..*": "text input of BERT, not used",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*": "BERT's feed-forward for text, not used",
    r"Qformer\.cls\..*": "BERT's text head, not used",
    r"(t5|opt|vision|text)_proj\..*|itm_head\..*|temp": "BLIP-2's own heads and language model projection, not used",
}

PIECES: dict[str, Piece] = {
    "eva_vit": Piece(
        "EVA-CLIP ViT-g weights",
        "--eva-vit",
        "blocks.0.attn.q_bias",
        lambda cfg: eva_vit.rules(cfg.vit),
        lambda cfg: eva_vit.extras(cfg.vit),
    ),
    "blip2": Piece("BLIP-2 Q-Former weights", "--blip2", "query_tokens", _blip2, lambda _: _BERT_TEXT),
    "imagebind": Piece(
        "ImageBind weights",
        "--imagebind",
        "modality_trunks.audio.blocks.0.norm_1.weight",
        lambda cfg: imagebind.rules(cfg.imagebind),
        lambda _: {**imagebind.EXTRAS, re.escape(imagebind.AUDIO_SCALE): "kept in config.json"},
    ),
    "vl": Piece(
        "a Video-LLaMA vision-language checkpoint",
        "--vl",
        "video_query_tokens",
        _vl,
        lambda cfg: {rf"audio_{'(?!encoder)' * cfg.has_audio}.*": "the audio branch; give the file as --al too"},
    ),
    "al": Piece(
        "a Video-LLaMA audio-language checkpoint",
        "--al",
        "audio_query_tokens",
        _al,
        lambda _: {r"video_.*|llama_proj\..*": "the vision branch; give the file as --vl too"},
    ),
    "minigpt4": Piece(
        "a MiniGPT-4 projection",
        "--minigpt4",
        "llama_proj.weight",
        lambda _: linear("llama_proj", "llama_proj"),
        lambda _: {},
    ),
    "llama": Piece(
        "LLaMA weights",
        "--llama",
        "model.embed_tokens.weight",
        lambda cfg: find_family(cfg.llama.family).rules(cfg.llama),
        lambda cfg: find_family(cfg.llama.family).extras(cfg.llama),
    ),
}


def recognise(source: Container[str]) -> list[str]:
    """The kinds that a file is, by the names of the tensors in it. A checkpoint of both branches is two; `llama_proj`
    alone is MiniGPT-4's, beside the vision branch it belongs to that."""
    kinds = [kind for kind, piece in PIECES.items() if piece.signature in source]
    return [kind for kind in kinds if kind != "minigpt4" or "vl" not in kinds]


def unwrapped(source: Source) -> Source:
    """The same tensors without what training puts before every name: "module." (DDP), "base_model.model." (peft), ….

    torch.compile's "_orig_mod." may be anywhere in a name. Where that makes it no known kind, the source as it is.
    """
    names = {name: name.replace("_orig_mod.", "") for name in source.shapes}
    prefix = ""
    while not recognise(stripped := {name.removeprefix(prefix) for name in names.values()}):
        first = {name.partition(".")[0] for name in stripped if "." in name}
        if len(first) != 1 or not all("." in name for name in stripped):
            return source
        prefix += f"{first.pop()}."
    removed = [prefix] * bool(prefix) + ["_orig_mod."] * any(name != kept for name, kept in names.items())
    if not removed:
        return source
    note = f"{source.label}: names are read without {' and '.join(removed)}, which a wrapper put there in training"
    return renamed(source, {name: kept.removeprefix(prefix) for name, kept in names.items()}, note)


def check_kind(kind: str, source: Source) -> None:
    """Raises CheckpointError, saying what the file is and where it belongs, when it is not of this kind."""
    found = recognise(source)
    if kind in found:
        return
    if found:
        other = PIECES[found[0]]
        raise CheckpointError(
            f"{source.label}: given as {PIECES[kind].option}, but it is {other.what}; give it as {other.option}"
        )
    raise CheckpointError(
        f"{source.label}: given as {PIECES[kind].option}, but it is not {PIECES[kind].what} "
        f"(no tensor {PIECES[kind].signature}; it holds {_some(source.shapes)})"
    )


def _some(names: Mapping[str, object]) -> str:
    listed = ", ".join(list(names)[:3])
    return f"{listed}, …" if len(names) > 3 else listed or "nothing"
