"""vllama convert."""

from pathlib import Path
from typing import Literal

import tyro

from vllama_jax.branches import get_branches
from vllama_jax.cli._devices import use_cpu_only
from vllama_jax.cli._progress import bytes_bar
from vllama_jax.convert import ConversionPlan, bytes_to_write
from vllama_jax.convert import convert as write
from vllama_jax.convert import plan as make_plan
from vllama_jax.convert.new_weights import SEED
from vllama_jax.errors import ConfigError
from vllama_jax.io.atomic import check_absent
from vllama_jax.io.json_files import read_object
from vllama_jax.text.templates import TemplateName


def convert(
    directory: tyro.conf.Positional[Path | None] = None,
    /,
    *,
    out: Path,
    llama: Path | None = None,
    eva_vit: Path | None = None,
    blip2: Path | None = None,
    delta: Path | None = None,
    imagebind: Path | None = None,
    minigpt4: Path | None = None,
    vl: Path | None = None,
    al: Path | None = None,
    base: Path | None = None,
    config: Path | None = None,
    template: TemplateName | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    without: tuple[str, ...] = (),
    seed: int = SEED,
) -> None:
    """Make a model directory from the original's PyTorch files (.pth, .bin) or safetensors of the same tensors.

    Example: vllama convert --llama vicuna-7b --eva-vit eva_vit_g.pth --blip2 blip2_pretrained_flant5xxl.pth
    --imagebind imagebind_huge.pth --vl finetune_vl.pth --al finetune_al.pth --out model

    Example: vllama convert Video-LLaMA-2-7B-Finetuned --eva-vit eva_vit_g.pth --blip2 blip2_pretrained_flant5xxl.pth
    --template llama_2 --out model

    Example: vllama convert --base model --vl vision_run --al audio_run --out joined

    Example: vllama convert --base model --without video_qformer --config sixty_four_queries.json --out changed

    Args:
        directory: Holds weight files, in it or below; each is identified by its tensors. Options win.
        out: The model directory to make.
        llama: The directory of a LLaMA, Mistral, Qwen2 or Qwen3 in Hugging Face's layout (config.json, tokenizer,
            weights), or of a LLaMA in Meta's (params.json, consolidated.00.pth). This and all files may be on the hub:
            hf://org/name, hf://org/name/file.
        eva_vit: EVA-CLIP ViT-g (eva_vit_g.pth).
        blip2: BLIP-2's Q-Former (blip2_pretrained_flant5xxl.pth).
        delta: A language model released as a difference (vicuna-7b-delta-v0): --llama is what it is added to.
        imagebind: ImageBind (imagebind_huge.pth); without it the model cannot hear.
        minigpt4: MiniGPT-4's projection, from which stage 1 starts (pretrained_minigpt4.pth).
        vl: A checkpoint of the vision-language branch, or a run that trained it.
        al: A checkpoint of the audio-language branch, or a run that trained it.
        base: A model directory or a run: the new model has all of it but the parts that are given anew.
        config: A JSON file with any part of the model config, over what the files tell.
        template: The prompt template that the language model was tuned on; unless --base or --config has one, vicuna
            for LLaMA, mistral for Mistral and chatml for Qwen.
        dtype: Of the weights on disk; as they come unless given.
        without: Components of --base, as `vllama inspect` lists them, that get new random weights: for shapes that
            --config changes.
        seed: Of the new weights; that of run configs unless given.
    """
    check_absent(out)
    use_cpu_only()  # what runs trained comes through JAX
    files = {"eva_vit": eva_vit, "blip2": blip2, "imagebind": imagebind, "minigpt4": minigpt4, "vl": vl, "al": al}
    override = read_object(config, ConfigError) if config else {}
    plan = make_plan(
        directory=directory,
        llama_directory=llama,
        delta=delta,
        files=files,
        base=base,
        config=override,
        template=template,
        without=without,
        seed=seed,
    )
    print("".join(f"{line}\n" for line in plan.notes), end="", flush=True)
    with bytes_bar(bytes_to_write(plan, dtype)) as progress:
        write(plan, out, dtype=dtype, progress=progress)
    print(_summary(plan, out))


def _summary(plan: ConversionPlan, out: Path) -> str:
    parts = {leaf.target.split("/")[0] for leaf in plan.all_leaves}
    lines = [
        f"{out}: {len(plan.all_leaves)} weights of {', '.join(sorted(parts))}; prompt template {plan.config.template}"
    ]
    lines += [f"  left out, {count} tensor{'s' * (count > 1)} of {reason}" for reason, count in plan.left_out.items()]
    if plan.new:
        lines.append(f"  new random weights, to be trained: {', '.join(plan.new)}")
    needed = [part.split("/")[0] for one in get_branches(plan.config) for part in (one.qformer, one.projection)]
    if untrained := [part for part in dict.fromkeys(needed) if part not in parts]:
        lines.append(f"  no {', '.join(untrained)} yet: train it, or convert with the checkpoints that have them")
    return "\n".join(lines)
