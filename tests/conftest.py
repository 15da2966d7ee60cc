"""Shared fixtures: golden values computed by the original code, tiny models, records and a clip.

The tests use 8 CPU devices, so that sharding over a mesh can be tested on any machine. Programs are compiled with few
optimizations, which makes the tests a quarter faster; `.ci/run` runs the commands of the README with all of them.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import media_fixtures
import pytest
import train_fixtures

from vllama_jax import convert
from vllama_jax.convert.tiny import write_tiny

pytest_plugins = ["browser_fixtures", "generate_fixtures"]

MAX_MAPS = 30_000

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for the commands that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that no worker starts one when the others have finished."""
    longest = (
        "test_miniature_recipe.py",
        "test_train_run.py",
        "test_quantize.py",
        "test_store_s3.py",
        "test_train_step.py",
    )
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> None:
    """Use one compilation cache for all workers of a session and the commands that they start.

    It is in pytest's cache, so that a later session (the slow tests after the fast ones, as in `.ci/run`) compiles only
    what is new. JAX identifies a program by its content, its options and the version of JAX. `pytest --cache-clear`
    removes the folder.
    """
    folder = session_folder(tmp_path_factory)
    os.environ["VLLAMA_CACHE"] = str(folder)
    compiled = folder / "compiled"
    if request.config.pluginmanager.has_plugin("cacheprovider"):  # unset with `-p no:cacheprovider`
        with contextlib.suppress(FileExistsError):  # another worker was first
            compiled.symlink_to(request.config.cache.mkdir("compiled"))
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module", autouse=True)
def room_for_compiled_programs() -> Iterator[None]:
    """Drop the compiled programs of a worker that has many, after a file of tests.

    XLA's CPU programs take about 13 memory maps each. Linux allows a process 65,530 (vm.max_map_count), which a worker
    of the slow tests reaches; the process then ends with a segmentation fault.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Replace `os.fsync`: files of tests need not survive a power failure.

    `os.fsync` takes 12 ms on a virtual disk, and the conversion of the tiny model calls it 185 times.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the temporary folder of the session, which all workers share."""
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Build a folder that all workers of the session share: the first that needs it builds, the others wait."""

    def built(name: str, build: Callable[[Path], object]) -> Path:
        folder = session_folder(tmp_path_factory) / name
        done = folder.with_suffix(".done")
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    return built


GOLDEN_HEADS = {component: {"num_heads": 4} for component in ("vit", "image_qformer", "video_qformer", "audio_qformer")}
GOLDEN_HEADS["imagebind"] = {modality: {"num_heads": 4} for modality in ("audio", "vision")}


def find_shared() -> Path | None:
    """Return the folder of shared data: VLLAMA_SHARED, or the nearest `shared` in or above the checkout."""
    named = os.environ.get("VLLAMA_SHARED")
    candidates = [Path(named)] if named else [parent / "shared" for parent in Path(__file__).resolve().parents[1:]]
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data (see `find_shared`); tests that need it are skipped without it."""
    if found := find_shared():
        return found
    if named := os.environ.get("VLLAMA_SHARED"):
        pytest.fail(f"VLLAMA_SHARED names {named}, which is not there")
    return pytest.skip("golden data not here: set VLLAMA_SHARED")


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Weights in the original's file layouts, and all values that the original computes from them."""
    return shared / "golden"


@pytest.fixture(scope="session")
def golden_files(golden: Path) -> dict[str, Path]:
    """The golden weight files by component, as `convert.plan` names them, with the language model as .bin shards."""
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
def golden_model(golden_files: dict[str, Path], build_once) -> Path:
    """A model directory of all golden components. Read-only."""
    return build_once("golden", lambda folder: _converted(golden_files, GOLDEN_HEADS, folder / "model")) / "model"


@pytest.fixture(scope="session")
def tiny_files(build_once) -> dict[str, Path]:
    """Random weights of a complete tiny model as safetensors: paths by component, and "config" with the head counts."""

    def write(folder: Path) -> None:
        paths = write_tiny(folder / "files")
        (folder / "paths.json").write_text(json.dumps({kind: str(path) for kind, path in paths.items()}))

    paths = json.loads((build_once("tiny", write) / "paths.json").read_text())
    return {kind: Path(path) for kind, path in paths.items()}


@pytest.fixture(scope="session")
def tiny_model(tiny_files: dict[str, Path], build_once) -> Path:
    """A model directory of the tiny weights. Read-only."""
    config = json.loads(tiny_files["config"].read_text())
    return build_once("tiny_model", lambda folder: _converted(tiny_files, config, folder / "model")) / "model"


@pytest.fixture(scope="session")
def clip(build_once) -> Path:
    """A video of three seconds with audio (mp4, H.264 and AAC)."""

    def write(folder: Path) -> None:
        media_fixtures.write_video(folder / "clip.mp4", num_frames=75, waveform=media_fixtures.tone(3, 16000))

    return build_once("media", write) / "clip.mp4"


@pytest.fixture(scope="session")
def records(build_once) -> Path:
    """Records of four videos and two images with conversations. Read-only."""
    return _records(build_once, "seen")


@pytest.fixture(scope="session")
def real_records(build_once) -> Path:
    """The same records, and those of the shared clips if available. Read-only."""
    found = find_shared()
    return _records(build_once, "real", media=found and found / "media")


@pytest.fixture(scope="session")
def image_records(build_once) -> Path:
    """Records of two images only: a run of them compiles one step, and images with videos two."""
    return _records(build_once, "pictures", videos=0)


@pytest.fixture(scope="session")
def stage1(build_once, tiny_model: Path, image_records: Path) -> Path:
    """A finished run of eight steps on one device. Read-only."""

    def run(folder: Path) -> None:
        from vllama_jax.train.loop import train

        with pytest.MonkeyPatch.context() as patch:
            train_fixtures.use_one_device(patch)
            train(
                train_fixtures.short_config(tiny_model, image_records),
                folder / "run",
                train_fixtures.RecordingReporter(),
            )

    return build_once("stage1", run) / "run"


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on one device (see `train_fixtures.use_one_device`)."""
    train_fixtures.use_one_device(monkeypatch)


def _records(build_once, name: str, **options) -> Path:
    def write(folder: Path) -> None:
        train_fixtures.write_records(train_fixtures.write_files(folder / "files", **options))

    return build_once(name, write) / "records"


def _converted(paths: dict[str, Path], config: dict, out: Path) -> Path:
    files = {kind: path for kind, path in paths.items() if kind not in ("llama", "config")}
    convert.convert(convert.plan(llama_directory=paths["llama"], files=files, config=config), out)
    return out


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """fsspec's store in memory, empty, and a cache folder of the test's own."""
    monkeypatch.setenv("VLLAMA_CACHE", str(tmp_path / "cache"))
    import fsspec

    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]
