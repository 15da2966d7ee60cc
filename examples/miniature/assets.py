"""Write the files that the package contains: a trained miniature, demo clips, and results.

    python -m vllama_jax.miniature.assets OUT [OTHERS...]

replaces them with the model that `python -m vllama_jax.miniature OUT` trained, with new renderings of the clips, and
with the results of OUT and of other seeds, in OTHERS. It prints the results as the table of docs/miniature.md.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vllama_jax.checkpoints.shipped import ASSETS, CLIPS, RESULTS
from vllama_jax.io.archives import pack
from vllama_jax.io.atomic import replace_json, write_json
from vllama_jax.io.json_files import read_object
from vllama_jax.miniature.command import run_command

DTYPE = "bfloat16"  # of the weights in the package


def write_assets(out: Path, others: Sequence[Path] = ()) -> None:
    """Replace the assets of the package.

    Args:
        out: OUT, with the model and its results. The clips show held-out combinations.
        others: Directories with the results of other seeds.
    """
    import numpy as np

    from vllama_jax import convert
    from vllama_jax.miniature import render
    from vllama_jax.miniature.scene import ObjectGroup, Scene
    from vllama_jax.miniature.world import write_clip, write_image

    bell = ObjectGroup(kind="bell", color="yellow", motion="left", size="large")
    drum = ObjectGroup(kind="drum", color="pink", motion="grows")
    clips = {
        "bell.mp4": Scene((bell,), ("bell",)),
        "dog_or_drum.mp4": Scene((drum,), ("dog",)),  # audio of another kind
        "two.mp4": Scene(
            (
                ObjectGroup(kind="frog", color="blue", motion="in turn"),
                ObjectGroup(kind="horn", color="red", motion="in turn"),
            ),
            ("frog", "horn"),
        ),
        "birds.jpg": Scene((ObjectGroup(kind="bird", color="pink", size="small", number=3),)),
    }
    results = [read_object(directory / "results.json") for directory in (out, *others)]
    plan = convert.plan(files={}, base=out / "model")
    shutil.rmtree(ASSETS, ignore_errors=True)
    CLIPS.mkdir(parents=True)
    for number, (name, scene) in enumerate(clips.items()):
        rng = np.random.default_rng([10, number])  # chosen so that the answers are correct; results.json has accuracies
        if name.endswith(".jpg"):
            write_image(CLIPS / name, scene, rng)
        else:
            write_clip(CLIPS / name, scene, rng, seconds=render.SECONDS * len(scene.sounds), snr_db=20)
    with tempfile.TemporaryDirectory() as folder:
        convert.convert(plan, Path(folder, "model"), dtype=DTYPE)
        pack_model(Path(folder, "model"), ASSETS)
    write_json(RESULTS, results)


def pack_model(model: Path, folder: Path) -> None:
    """Archive a model directory.

    Args:
        model: The model directory.
        folder: Where model.zip is written, and model.json with the digests of that file and of the weights.
    """
    import xxhash

    from vllama_jax.checkpoints.directory import open_model

    digest = open_model(model).digest
    pack(model, folder / "model.zip")
    archive_digest = xxhash.xxh3_128_hexdigest((folder / "model.zip").read_bytes())
    replace_json(folder / "model.json", {"archive_xxh3_128": archive_digest, "model_digest": digest})


def main(out: Path, others: tuple[Path, ...] = (), /) -> None:
    """Replace the assets of the package, and print the results.

    Args:
        out: OUT, with the model and its results.
        others: Directories with the results of other seeds.
    """
    from vllama_jax.miniature.figures import format_results, read_results

    write_assets(out, others)
    print(format_results(read_results(RESULTS)))


if __name__ == "__main__":
    run_command("vllama_jax.miniature.assets", main)
