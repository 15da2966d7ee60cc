"""What a user may have meant by an option that a command does not have."""

import difflib
import re
from collections.abc import Sequence

from vllama_jax.train.config import RENAMED_FIELDS

# Names that other programs and earlier versions use → ours. The first one that the command has is suggested.
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

# What is done in another way than by an option, by command ("" for all).
ADVICE = {
    "": {
        "cpu": "set JAX_PLATFORMS=cpu",
        "device": "set JAX_PLATFORMS to cpu, cuda or tpu",
        "gpu": "set JAX_PLATFORMS=cuda",
        "v": "ask `vllama --version`",
        "version": "ask `vllama --version`",
    },
    "chat": dict.fromkeys(
        ("prompt", "p", "q", "query", "question", "text"), 'write the question after the file: clip.mp4 "What rings?"'
    )
    | dict.fromkeys(("file", "i", "image", "input", "video"), "write the file first, without an option"),
    "train": {
        "config": "write the run config first, without an option",
        "epochs": "give --steps: epochs × records / --batch-size",
        "num-epochs": "give --steps: epochs × records / --batch-size",
        "num-train-epochs": "give --steps: epochs × records / --batch-size",
        "resume": "run again with the same --out",
        "resume-from-checkpoint": "run again with the same --out",
    },
}


def suggest_option(unknown: str, flags: Sequence[str], command: str) -> str:
    """Return "; did you mean --optim.lr?" or other advice for an option that a command does not have.

    Args:
        unknown: The option as it was typed: "--learning_rate".
        flags: The command's own.
        command: The command's name, for what it does without an option.
    """
    name = unknown.lstrip("-").replace("_", "-").lower()
    last = name.rsplit(".", 1)[-1]
    named = [flag for key in (name, last) for flag in OPTION_ALIASES.get(key, ()) if flag in flags]
    if named:
        return f"; did you mean {named[0]}?"
    dataset = re.match(r"datasets\.(\d+)\.", name)
    number = dataset[1] if dataset else ""
    renamed = RENAMED_FIELDS.get(name.replace(f".{number}.", ".*.").replace("-", "_"), "")
    current = "--" + renamed.replace("*", number).replace("_", "-")
    if current in flags:
        return f"; it is now {current}"
    for of in (command, ""):
        if last in ADVICE.get(of, {}):
            return f"; {ADVICE[of][last]}"
    same_end = [flag for flag in flags if flag.removeprefix("--").rsplit(".", 1)[-1] == last]
    negated = [flag for flag in flags if flag == f"--no-{name}"]
    close = same_end + negated + difflib.get_close_matches(f"--{name}", flags, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else "; --help lists them"
