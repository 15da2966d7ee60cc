"""The command `vllama convert`."""

from pathlib import Path
from typing import Literal

import tyro

from vllama_jax.branches import get_branches
from vllama_jax.cli._devices import use_cpu_only
from vllama_jax.cli._display import format_count
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
    published_encoders: bool = False,
) -> None:
    """Create a model directory from the original's PyTorch files (.pth, .bin) or safetensors with the same tensors.

    Example: vllama convert --llama vicuna-7b --eva-vit eva_vit_g.pth --blip2 blip2_pretrained_flant5xxl.pth
    --imagebind imagebind_huge.pth --vl finetune_vl.pth --al finetune_al.pth --out model

    Example: vllama convert Video-LLaMA-2-7B-Finetuned --eva-vit eva_vit_g.pth --blip2 blip2_pretrained_flant5xxl.pth
    --template llama_2 --out model

    Example: vllama convert --base model --vl vision_run --al audio_run --out joined

    Example: vllama convert --base model --without video_qformer --config sixty_four_queries.json --out changed

    Args:
        directory: A directory that is searched for weight files, with its subdirectories. Each file is identified by
            its tensors. Options take precedence.
        out: The model directory to create.
        llama: The directory of a LLaMA, Mistral, Qwen2 or Qwen3 in Hugging Face's layout (config.json, tokenizer,
            weights), or of a LLaMA in Meta's (params.json, consolidated.00.pth). All paths may be Hugging Face Hub
            addresses: hf://org/name, hf://org/name/file.
        eva_vit: EVA-CLIP ViT-g (eva_vit_g.pth).
        blip2: BLIP-2's Q-Former (blip2_pretrained_flant5xxl.pth).
        delta: A language model released as a delta (vicuna-7b-delta-v0), which is added to --llama.
        imagebind: ImageBind (imagebind_huge.pth). Without it the model has no audio branch.
        minigpt4: MiniGPT-4's projection, from which stage 1 starts (pretrained_minigpt4.pth).
        vl: A checkpoint of the vision-language branch, or a run that trained it.
        al: A checkpoint of the audio-language branch, or a run that trained it.
        base: A model directory or a run. Its components are copied, except those given by other options.
        config: A JSON file with fields of the model config, which override those inferred from the files.
        template: The prompt template that the language model was tuned on. By default that of --base or --config, or
            else vicuna for LLaMA, mistral for Mistral and chatml for Qwen.
        dtype: The dtype of the weights on disk; by default that of the files.
        without: Components of --base, as `vllama inspect` lists them, that get new random weights, because --config
            changes their shapes.
        seed: The seed of new random weights.
        published_encoders: Download EVA-CLIP ViT-g (2.0 GB) and BLIP-2's Q-Former (0.5 GB) from LAVIS if no option and
            no file provides them.
    """
    check_absent(out)
    use_cpu_only()  # weights that runs trained are restored with JAX
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
        published_encoders=published_encoders,
    )
    print("".join(f"{line}\n" for line in plan.notes), end="", flush=True)
    with bytes_bar(bytes_to_write(plan, dtype)) as progress:
        write(plan, out, dtype=dtype, progress=progress)
    print(_format_summary(plan, out))


def _format_summary(plan: ConversionPlan, out: Path) -> str:
    components = sorted({leaf.target.split("/")[0] for leaf in plan.all_leaves})
    lines = [f"{out}: {format_count(len(plan.all_leaves), 'array')}; prompt template {plan.config.template}"]
    lines.append(f"  components: {', '.join(components)}")
    lines += [f"  skipped {format_count(count, 'tensor')} of {reason}" for reason, count in plan.left_out.items()]
    if plan.new:
        lines.append(f"  new random weights, to be trained: {', '.join(plan.new)}")
    paths = [path for branch in get_branches(plan.config) for path in (branch.qformer, branch.projection)]
    needed = dict.fromkeys(path.split("/")[0] for path in paths)
    if untrained := [component for component in needed if component not in components]:
        lines.append(f"  missing {', '.join(untrained)}: train them, or convert with the checkpoints that have them")
    return "\n".join(lines)
