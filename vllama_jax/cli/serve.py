"""The command `vllama serve`."""

import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vllama_jax.checkpoints.directory import open_model
from vllama_jax.checkpoints.shipped import MODEL_DESCRIPTION, MODEL_NAME, is_shipped, shipped_model
from vllama_jax.cli._display import Display
from vllama_jax.errors import ConfigError
from vllama_jax.model import load, remove_missing_branches
from vllama_jax.nn.network import default_dtype
from vllama_jax.runtime.extras import import_extra
from vllama_jax.serve.options import ServeOptions, read_keys

DEFAULTS = ServeOptions()
_PACKAGES = ("fastapi", "httpx", "uvicorn", "python_multipart", "pebble", "prometheus_client")


def serve(
    model: tyro.conf.Positional[Path | None] = None,
    /,
    *,
    options: Annotated[ServeOptions, tyro.conf.arg(name="")] = DEFAULTS,
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    audio_scale: float | None = None,
    base: Path | None = None,
) -> None:
    """Serve a model with the API of OpenAI: chat completions about videos, images and audio.

    Example: vllama serve MODEL --api-key-file keys.txt

    docs/serving.md describes the API, the limits and the security of the server. Ctrl-C finishes the running answers.

    Args:
        model: A model directory (see `vllama convert`), a run directory (see `vllama train`), or hf://OWNER/NAME on the
            Hugging Face Hub. By default `miniature`, the small model of the package, unless a model directory has that
            name.
        options: The address, the keys, where media may come from, and the limits.
        dtype: The dtype of weights and computation; by default float32 on a CPU and bfloat16 elsewhere.
        quantize: Quantize the large weights when the model is loaded.
        audio_scale: The norm of ImageBind's audio embeddings; by default the model's, 20 as published.
        base: The base model of a run, if it has moved.
    """
    for package in _PACKAGES:
        import_extra(package, "serve", "vllama serve", ConfigError)
    from vllama_jax.serve.run import get_url, open_socket, run_server, warn_if_open
    from vllama_jax.serve.service import make_service
    from vllama_jax.serve.vllm_engine import make_requirements, require_server

    keys = read_keys(options.api_key_file)
    if options.allow_files is not None and not options.allow_files.is_dir():
        raise ConfigError(f"{options.allow_files}: not a directory; set --allow-files to the directory of the files")
    start, uses_shipped_model = time.monotonic(), model is None or is_shipped(model)
    with Display() as display, open_socket(options) as opened:  # fail early: loading takes minutes
        warn_if_open(options, keys)
        path = shipped_model() if model is None or uses_shipped_model else model
        if uses_shipped_model:
            display.show_message(MODEL_DESCRIPTION.replace("choose another model with --model", "name another model"))
        directory = remove_missing_branches(open_model(path, base))
        has_engine = options.engine is None
        if options.engine is not None:
            display.show_status(f"checking {options.engine}")
            llama = directory.config.llama
            require_server(
                options.engine, make_requirements(llama, dtype or default_dtype(), options.max_request_tokens)
            )
        display.show_status(f"loading {directory.path}")
        loaded = load(directory, dtype, quantize=quantize, audio_scale=audio_scale, llama_layers=has_engine)
        name = options.name or (MODEL_NAME if uses_shipped_model else path.resolve().name)
        service = make_service(loaded, name, options, keys)
        display.show_status("compiling" if has_engine else f"waiting for {options.engine}")

        def show_address() -> None:
            seconds = time.monotonic() - start
            display.show_message(f"{name} is served at {get_url(opened)} (ready after {seconds:.0f} s)")

        run_server(service, opened, show_address)
