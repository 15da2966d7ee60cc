"""Train a miniature from scratch.

    python -m vllama_jax.miniature OUT --seed 0

writes the world, trains the frozen components and both branches in both stages, and measures the model, in about 100
minutes on two cores. All files are under OUT; the same command resumes a run that was interrupted. Chat with the model
with `vllama chat FILE --model OUT/model`. OUT/results.json has the table that is printed at the end.
"""

import time
from collections.abc import Callable
from pathlib import Path

from vllama_jax.io.atomic import replace_json
from vllama_jax.io.json_files import read_object
from vllama_jax.miniature.command import run_command
from vllama_jax.runtime.compilation_cache import enable_compilation_cache


def main(out: Path, /, *, seed: int = 0, clips: int = 500) -> None:
    """Train a miniature Video-LLaMA from scratch and measure it. The same command resumes an interrupted run.

    Args:
        out: The output directory.
        seed: The seed of the world and of the frozen components. The branches use the seed of their run configs.
        clips: The number of files of each measure.
    """
    enable_compilation_cache()
    from vllama_jax.miniature.evaluate import check_arguments, format_measures
    from vllama_jax.miniature.recipe import Recipe, make_base_model, train_branches
    from vllama_jax.miniature.run_records import make_log, total_minutes

    check_arguments(seed, clips)
    file = out / "results.json"
    start_time, is_new = time.perf_counter(), not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    log, recipe = make_log(start_time), Recipe()
    make_base_model(out, seed, recipe, log)
    train_branches(out, recipe, log)
    results = measure_models(out, seed, clips, log)
    minutes = total_minutes(file, start_time, is_new)
    replace_json(file, {"seed": seed, "minutes": minutes, "measures": results})
    print(format_measures(results))


def measure_models(out: Path, seed: int, clips: int, log: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Measure the model and its baselines, and store the results in OUT/measures.

    Args:
        out: OUT, with the models.
        seed: The seed of the files.
        clips: The number of files of each measure.
        log: Called with progress messages.

    Returns:
        The measures by name.
    """
    from vllama_jax.miniature import evaluate
    from vllama_jax.model import load

    folder = out / "measures"
    folder.mkdir(exist_ok=True)
    results: dict[str, dict[str, float]] = {}
    work = (
        ("model", "model", evaluate.evaluate),
        ("without_positions", "model_without_positions", evaluate.measure_without_positions),
        ("random_hearing", "model", evaluate.measure_random_audio_tower),
    )
    for name, model, measure in work:
        file = folder / f"{name}-{clips}.json"
        if not file.exists():
            replace_json(file, measure(load(out / model), seed, clips, log))
        results |= read_object(file)
    return results


if __name__ == "__main__":
    run_command("vllama_jax.miniature", main)
