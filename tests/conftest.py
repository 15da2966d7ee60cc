"""What several test files share: golden values computed by the original code, tiny models, a clip.

The tests see 8 CPU devices, so that what is split over a mesh can be tried on any machine. Programs are compiled with
few optimisations, which takes a quarter off the tests' time; `.ci/run` runs the README's commands with all of them.
"""

import json
import os
from pathlib import Path

import jax
import media_fixtures
import pytest
import train_fixtures

from vllama_jax import convert
from vllama_jax.convert.tiny import write_tiny

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for the commands that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker begins one when the others end."""
    items.sort(key=lambda item: item.path.name not in ("test_train_run.py", "test_train_step.py", "test_verify.py"))


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One folder of compiled programs for all workers of a session and the commands that they start: many tests need
    the same one, and none writes into the user's.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["VLLAMA_CACHE"] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


GOLDEN_HEADS = {part: {"num_heads": 4} for part in ("vit", "image_qformer", "video_qformer", "audio_qformer")}
GOLDEN_HEADS["imagebind"] = {sense: {"num_heads": 4} for sense in ("audio", "vision")}


def find_shared() -> Path | None:
    """The folder of shared data: VLLAMA_SHARED, else the nearest `shared` in or above the checkout."""
    named = os.environ.get("VLLAMA_SHARED")
    candidates = [Path(named)] if named else [parent / "shared" for parent in Path(__file__).resolve().parents[1:]]
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """See `find_shared`; tests that need it are skipped where it is not."""
    if found := find_shared():
        return found
    if named := os.environ.get("VLLAMA_SHARED"):
        pytest.fail(f"VLLAMA_SHARED names {named}, which is not there")
    return pytest.skip("golden data not here: set VLLAMA_SHARED")


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Weights in the original's file layouts, and every value that it computes from them."""
    return shared / "golden"


@pytest.fixture(scope="session")
def golden_files(golden: Path) -> dict[str, Path]:
    """Golden's weight files by kind, as `convert.plan` names them, with the language model as .bin shards."""
    names = {
        "llama": "llama-bin",
        "eva_vit": "eva_vit_g.pth",
        "blip2": "blip2_pretrained_flant5xxl.pth",
        "imagebind": "imagebind_huge.pth",
        "minigpt4": "pretrained_minigpt4.pth",
        "vl": "finetune_vl.pth",
        "al": "finetune_al.pth",
    }
    return {kind: golden / "weights" / name for kind, name in names.items()}


@pytest.fixture(scope="session")
def golden_model(golden_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of all of golden's pieces."""
    return _converted(golden_files, GOLDEN_HEADS, tmp_path_factory.mktemp("golden") / "model")


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random weights of a whole model as safetensors: paths by kind, and "config" with the head counts."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "files")


@pytest.fixture(scope="session")
def tiny_model(tiny_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of the tiny weights. Not to be written to."""
    config = json.loads(tiny_files["config"].read_text())
    return _converted(tiny_files, config, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of a video with sound (mp4, H.264 and AAC)."""
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    return media_fixtures.write_video(path, num_frames=75, sound=media_fixtures.tone(3, 16000))


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos and two pictures, with turns. Not to be written to."""
    return train_fixtures.write_records(train_fixtures.write_files(tmp_path_factory.mktemp("seen") / "clips"))


@pytest.fixture(scope="session")
def real_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, and the shared clips where they are."""
    found = find_shared()
    files = train_fixtures.write_files(tmp_path_factory.mktemp("real") / "clips", found and found / "media")
    return train_fixtures.write_records(files)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two pictures alone: a run of them compiles one step, where pictures and videos take two."""
    return train_fixtures.write_records(
        train_fixtures.write_files(tmp_path_factory.mktemp("pictures") / "files", videos=0)
    )


@pytest.fixture(scope="session")
def stage1(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pictures: Path) -> Path:
    """A finished run of eight steps on 8 devices. Not to be written to."""
    from vllama_jax.train.loop import train

    run = tmp_path_factory.mktemp("stage1") / "run"
    train(train_fixtures.short_config(tiny_model, pictures), run, train_fixtures.Quiet())
    return run


def _converted(paths: dict[str, Path], config: dict, out: Path) -> Path:
    files = {kind: path for kind, path in paths.items() if kind not in ("llama", "config")}
    convert.convert(convert.plan(llama_directory=paths["llama"], files=files, config=config), out)
    return out
