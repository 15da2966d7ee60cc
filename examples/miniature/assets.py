"""What of the miniature comes with the package: a trained model in one file, and clips to ask it about.

    python -m vllama_jax.miniature.assets OUT [OTHERS...]

puts the model that `python -m vllama_jax.miniature OUT` made in their place, and renders the clips again. Results are
those of OUT and of the same command with other seeds, in OTHERS; they are printed as docs/miniature.md has them.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vllama_jax.checkpoints.shipped import ASSETS, CLIPS, RESULTS
from vllama_jax.io.archives import pack
from vllama_jax.io.atomic import replace_json, write_json
from vllama_jax.io.json_files import read_object

DTYPE = "bfloat16"  # of the weights that are shipped


def write_assets(out: Path, others: Sequence[Path] = ()) -> None:
    """Puts OUT/model into the box, clips of combinations that it was not trained on beside it, and results of all."""
    import numpy as np

    from vllama_jax import convert
    from vllama_jax.miniature import render
    from vllama_jax.miniature.scene import ObjectGroup, Scene
    from vllama_jax.miniature.world import write_clip, write_image

    bell = ObjectGroup(kind="bell", color="yellow", motion="left", size="large")
    drum = ObjectGroup(kind="drum", color="pink", motion="grows")
    clips = {
        "bell.mp4": Scene((bell,), ("bell",)),
        "dog_or_drum.mp4": Scene((drum,), ("dog",)),  # a dog is heard
        "two.mp4": Scene(
            (
                ObjectGroup(kind="frog", color="blue", motion="in turn"),
                ObjectGroup(kind="horn", color="red", motion="in turn"),
            ),
            ("frog", "horn"),
        ),
        "birds.jpg": Scene((ObjectGroup(kind="bird", color="pink", size="small", number=3),)),
    }
    results = [read_object(one / "results.json") for one in (out, *others)]
    plan = convert.plan(files={}, base=out / "model")
    shutil.rmtree(ASSETS, ignore_errors=True)
    CLIPS.mkdir(parents=True)
    for number, (name, scene) in enumerate(clips.items()):
        rng = np.random.default_rng([10, number])  # clips it is right about; results say how often it is
        if name.endswith(".jpg"):
            write_image(CLIPS / name, scene, rng)
        else:
            write_clip(CLIPS / name, scene, rng, seconds=render.SECONDS * len(scene.sounds), snr_db=20)
    with tempfile.TemporaryDirectory() as folder:
        convert.convert(plan, Path(folder, "model"), dtype=DTYPE)
        pack_model(Path(folder, "model"), ASSETS)
    write_json(RESULTS, results)


def pack_model(model: Path, box: Path) -> None:
    """Write a model directory as box/model.zip, and the digests of that file and of the weights as box/model.json."""
    import xxhash

    from vllama_jax.checkpoints.directory import open_model

    digest = open_model(model).digest
    pack(model, box / "model.zip")
    archive_digest = xxhash.xxh3_128_hexdigest((box / "model.zip").read_bytes())
    replace_json(box / "model.json", {"archive_xxh3_128": archive_digest, "model_digest": digest})


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m vllama_jax.miniature.assets OUT [OTHERS...]")
    first, *others = map(Path, sys.argv[1:])
    write_assets(first, others)
    from vllama_jax.miniature import figures

    print(figures.format_results(figures.read_results(RESULTS)))
