"""The persistent compilation cache of the Python API: used when a model is loaded, and never an obstacle."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAY = "import jax; print(repr(jax.config.jax_compilation_cache_dir))\n"
KEEP = f"from vllama_jax.runtime.compilation_cache import enable_compilation_cache\nenable_compilation_cache()\n{SAY}"


def python(code: str, **environment: str) -> tuple[str, str]:
    """Run Python code with none of our environment variables but `environment`; return stdout and stderr."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "VLLAMA_", "XDG_"))}
    environment = {**kept, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout, done.stderr


@pytest.mark.slow
def test_a_process_that_loads_no_model_keeps_jaxs_settings(tmp_path):
    code = f"import vllama_jax as vl; vl.Chat, vl.load, vl.media.read_image, vl.sharding.make_mesh\n{SAY}"
    assert python(code, VLLAMA_CACHE=str(tmp_path)) == ("None\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_cache_folder_can_be_set_or_disabled_by_the_user(tmp_path):
    ours, theirs = tmp_path / "ours", str(tmp_path / "theirs")
    assert python(KEEP, VLLAMA_CACHE=str(ours)) == (f"'{ours}/compiled'\n", "")
    assert python(KEEP, VLLAMA_CACHE=str(ours), JAX_COMPILATION_CACHE_DIR=theirs) == (f"'{theirs}'\n", "")
    assert python(KEEP, VLLAMA_CACHE=str(ours), JAX_ENABLE_COMPILATION_CACHE="false") == ("None\n", "")


@pytest.mark.slow
def test_an_unusable_cache_folder_is_reported_and_ignored(tmp_path):
    (tmp_path / "file").touch()
    folders = [f"{tmp_path}/file", f"{tmp_path}/file/below", "/proc/nowhere"]
    code = (
        "import os\nfrom vllama_jax.runtime.compilation_cache import enable_compilation_cache\n"
        f"for folder in {folders}:\n    os.environ['VLLAMA_CACHE'] = folder\n    enable_compilation_cache()\n"
        f"{SAY}import jax.numpy as jnp; print(jax.jit(jnp.sin)(0.0))"
    )
    out, errors = python(code)
    assert out == "None\n0.0\n"
    for folder, line in zip(folders, errors.splitlines(), strict=True):
        assert line.startswith(f"the compilation cache is disabled: {folder}"), errors


@pytest.mark.slow
def test_corrupt_cache_entries_are_compiled_again(tmp_path):
    code = f"{KEEP}import jax.numpy as jnp; print(jax.jit(lambda x: jnp.sin(x) * 3)(0.0))"
    assert python(code, VLLAMA_CACHE=str(tmp_path))[0].endswith("\n0.0\n")
    kept = [path for path in (tmp_path / "compiled").iterdir() if path.name.endswith("-cache")]
    assert kept
    for file in kept:
        file.write_bytes(b"not a program")
    assert python(code, VLLAMA_CACHE=str(tmp_path))[0].endswith("\n0.0\n")


@pytest.mark.slow
def test_python_and_the_command_line_share_the_cache(tiny_model, clip, tmp_path):
    code = f"import vllama_jax as vl\nchat = vl.Chat(vl.load({str(tiny_model)!r}))\nchat.add({str(clip)!r})\n"
    python(code + "''.join(chat.ask('Hm?', max_new_tokens=8))", VLLAMA_CACHE=str(tmp_path))
    kept = sorted(path.name for path in (tmp_path / "compiled").glob("*-cache"))
    assert kept
    command = [Path(sys.executable).with_name("vllama"), "chat", clip, "Hm?", "--model", tiny_model]
    kept_environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = {**kept_environment, "JAX_PLATFORMS": "cpu", "VLLAMA_CACHE": str(tmp_path)}
    subprocess.run([*command, "--max-new-tokens", "8"], env=environment, check=True, capture_output=True)
    assert sorted(path.name for path in (tmp_path / "compiled").glob("*-cache")) == kept
