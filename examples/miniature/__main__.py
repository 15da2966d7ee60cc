"""A miniature from nothing:

    python -m vllama_jax.miniature OUT --seed 0

writes the world, trains the frozen parts and both branches in both stages, and measures what came of it, in about 80
minutes on two cores. Everything is kept under OUT; run again it goes on where it was stopped. OUT/model can be asked
with `vllama chat FILE --model OUT/model`; OUT/results.json has the figures that are printed at the end.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import tyro

from vllama_jax.errors import VllamaError
from vllama_jax.io.atomic import replace_json
from vllama_jax.io.json_files import read_object
from vllama_jax.runtime.compilation_cache import enable_compilation_cache


def main(out: tyro.conf.Positional[Path], /, *, seed: int = 0, clips: int = 500) -> None:
    """Make a miniature Video-LLaMA from nothing.

    Args:
        out: Where everything is kept.
        seed: Of the world and of the frozen parts. The branches' own is that of their run configs.
        clips: Files in each set that the model is measured on.
    """
    enable_compilation_cache()
    from vllama_jax.miniature.evaluate import check_arguments, format_measures
    from vllama_jax.miniature.recipe import Recipe, make_base_model, train_branches

    check_arguments(seed, clips)
    file = out / "results.json"
    began, from_nothing = time.perf_counter(), not out.exists()
    out.mkdir(parents=True, exist_ok=True)

    def log(text: str) -> None:
        print(f"[{(time.perf_counter() - began) / 60:5.1f} min] {text}", file=sys.stderr, flush=True)

    recipe = Recipe()
    make_base_model(out, seed, recipe, log)
    train_branches(out, recipe, log)
    results = measure_models(out, seed, clips, log)
    minutes: float | None
    if from_nothing:
        minutes = round((time.perf_counter() - began) / 60, 1)
    else:  # known if it is whole already, but not of a run that was taken up again
        minutes = read_object(file)["minutes"] if file.exists() else None
    replace_json(file, {"seed": seed, "minutes": minutes, "measures": results})
    print(format_measures(results))


def measure_models(out: Path, seed: int, clips: int, log: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """All measures of the model, and those of the models that it is compared with; kept in OUT/measures."""
    from vllama_jax.miniature import evaluate
    from vllama_jax.model import load

    folder = out / "measures"
    folder.mkdir(exist_ok=True)
    found: dict[str, dict[str, float]] = {}
    work = (
        ("model", "model", evaluate.evaluate),
        ("without_positions", "model_without_positions", evaluate.measure_without_positions),
        ("random_hearing", "model", evaluate.measure_random_audio_tower),
    )
    for name, of, figures in work:
        file = folder / f"{name}-{clips}.json"
        if not file.exists():
            replace_json(file, figures(load(out / of), seed, clips, log))
        found |= read_object(file)
    return found


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m vllama_jax.miniature")
    except VllamaError as error:
        sys.exit(f"vllama: {error}")
