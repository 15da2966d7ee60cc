"""Suggestions for options that a command does not have."""

import difflib
import re
from collections.abc import Sequence

from vllama_jax.train.config import RENAMED_FIELDS

# Option names of other programs → options of this one. The first that the command has is suggested.
OPTION_ALIASES = {
    "bits": ("--quantize",),
    "bs": ("--batch-size",),
    "ckpt": ("--model",),
    "checkpoint": ("--model",),
    "datasets": ("--datasets.0.path",),
    "data": ("--datasets.0.path", "--source", "--annotations"),
    "device": ("--devices",),
    "fps": ("--num-frames",),
    "frames": ("--num-frames",),
    "grad-accum": ("--grad-accum-steps",),
    "gradient-accumulation": ("--grad-accum-steps",),
    "gradient-accumulation-steps": ("--grad-accum-steps",),
    "input": ("--source",),
    "learning-rate": ("--optim.lr",),
    "load-in-4bit": ("--quantize",),
    "load-in-8bit": ("--quantize",),
    "lr": ("--optim.lr",),
    "max-length": ("--max-new-tokens", "--length", "--datasets.0.text.max-length"),
    "max-seq-length": ("--datasets.0.text.max-length", "--length"),
    "max-steps": ("--steps",),
    "max-tokens": ("--max-new-tokens",),
    "model-name": ("--model",),
    "model-path": ("--model",),
    "num-steps": ("--steps",),
    "num-workers": ("--data.num-workers",),
    "o": ("--out",),
    "out-dir": ("--out",),
    "out-path": ("--out",),
    "outdir": ("--out",),
    "output": ("--out",),
    "output-dir": ("--out",),
    "output-path": ("--out",),
    "per-device-train-batch-size": ("--batch-size",),
    "precision": ("--dtype", "--compute-dtype"),
    "rank": ("--lora.rank",),
    "save-dir": ("--out",),
    "save-steps": ("--checkpoint.save-interval-steps",),
    "system-prompt": ("--system",),
    "temp": ("--temperature",),
    "to": ("--out",),
    "torch-dtype": ("--dtype", "--compute-dtype"),
    "train-batch-size": ("--batch-size",),
    "train-steps": ("--steps",),
    "video-folder": ("--videos",),
    "video-dir": ("--videos",),
    "warmup": ("--optim.warmup-steps",),
    "weight-decay": ("--optim.weight-decay",),
    "workers": ("--data.num-workers",),
}

# Advice for features that no option controls, by command ("" for all commands).
ADVICE = {
    "": {
        "cpu": "set JAX_PLATFORMS=cpu",
        "device": "set JAX_PLATFORMS to cpu, cuda or tpu",
        "gpu": "set JAX_PLATFORMS=cuda",
        "v": "use `vllama --version`",
        "version": "use `vllama --version`",
    },
    "chat": dict.fromkeys(
        ("prompt", "p", "q", "query", "question", "text"), 'write the question after the file: clip.mp4 "What rings?"'
    )
    | dict.fromkeys(("file", "i", "image", "input", "video"), "write the file first, without an option"),
    "train": {
        "config": "write the run config first, without an option",
        "epochs": "set --steps to epochs × records / --batch-size",
        "num-epochs": "set --steps to epochs × records / --batch-size",
        "num-train-epochs": "set --steps to epochs × records / --batch-size",
        "resume": "to resume, run again with the same --out",
        "resume-from-checkpoint": "to resume, run again with the same --out",
    },
}


def suggest_option(unknown: str, flags: Sequence[str], command: str) -> str:
    """Suggest what to use instead of an option that a command does not have.

    Args:
        unknown: The option as it was typed, such as "--learning_rate".
        flags: The options of the command.
        command: The name of the command.

    Returns:
        The end of an error message, such as "; did you mean --optim.lr?".
    """
    name = unknown.lstrip("-").replace("_", "-").lower()
    last = name.rsplit(".", 1)[-1]
    aliases = [flag for key in (name, last) for flag in OPTION_ALIASES.get(key, ()) if flag in flags]
    if aliases:
        return f"; did you mean {aliases[0]}?"
    dataset = re.match(r"datasets\.(\d+)\.", name)
    number = dataset[1] if dataset else ""
    renamed = RENAMED_FIELDS.get(name.replace(f".{number}.", ".*.").replace("-", "_"), "")
    current = "--" + renamed.replace("*", number).replace("_", "-")
    if current in flags:
        return f"; it is now {current}"
    for scope in (command, ""):
        if last in ADVICE.get(scope, {}):
            return f"; {ADVICE[scope][last]}"
    same_end = [flag for flag in flags if flag.removeprefix("--").rsplit(".", 1)[-1] == last]
    negated = [flag for flag in flags if flag == f"--no-{name}"]
    close = same_end + negated + difflib.get_close_matches(f"--{name}", flags, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else "; --help lists them"
