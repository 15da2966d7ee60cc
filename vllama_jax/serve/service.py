"""What the routes of a server share: the model, its engine, and the limits."""

import dataclasses
from typing import Literal

import numpy as np

from vllama_jax.chat import make_engine
from vllama_jax.model import Model
from vllama_jax.serve.decoding import DecoderPool
from vllama_jax.serve.errors import ApiError
from vllama_jax.serve.limits import Limits
from vllama_jax.serve.media_requests import MediaReader
from vllama_jax.serve.metrics import Metrics
from vllama_jax.serve.options import MEBIBYTE, ServeOptions
from vllama_jax.serve.protocol import EmbeddingRequest, GenerationFields, log_unknown_fields
from vllama_jax.serve.requests import RequestMaker
from vllama_jax.serve.responses import now
from vllama_jax.serve.scheduler import AnswerEngine, Scheduler
from vllama_jax.serve.uploads import Uploads
from vllama_jax.serve.vllm_engine import UNAVAILABLE, VllmEngine, make_requirements

STARTING_SECONDS = 5  # after which a client may try again


@dataclasses.dataclass(kw_only=True)
class Service:
    """A model that is served. `start` and `close` belong to the process of the server.

    Attributes:
        model: The model.
        name: Its name in the API.
        options: The server's options.
        keys: The API keys; none if everyone is answered.
        scheduler: Runs the engine, or asks another one.
        media: Reads the media of requests.
        requests: Makes requests for the engine.
        uploads: The uploaded files.
        decoders: The processes that decode media.
        limits: The totals of all requests.
        metrics: The metrics.
        created: When the service was made, in seconds since 1970.
        is_stopping: Whether new requests are refused, because the server is being stopped.
    """

    model: Model
    name: str
    options: ServeOptions
    keys: tuple[str, ...]
    scheduler: AnswerEngine
    media: MediaReader
    requests: RequestMaker
    uploads: Uploads
    decoders: DecoderPool
    limits: Limits
    metrics: Metrics
    created: int
    is_stopping: bool = False

    @property
    def status(self) -> Literal["ready", "starting", "unavailable", "stopping", "failed"]:
        """Whether requests are answered."""
        if self.is_stopping or self.scheduler.status == "stopped":
            return "stopping"
        if self.scheduler.status == "ready":
            return self.media.status
        return self.scheduler.status

    @property
    def is_compiling(self) -> bool:
        """Whether a thread compiles, which cannot be interrupted."""
        return self.scheduler.is_alive or self.media.status == "starting"

    def start(self) -> None:
        """Start the decoders, the encoder and the engine, which compile their programs first."""
        self.decoders.start()
        self.media.start()
        self.scheduler.start()

    def close(self) -> None:
        """Stop the engine and the decoders, and remove the uploaded files. Waits for the present dispatch."""
        self.scheduler.stop()
        self.decoders.close()
        self.media.close()
        self.uploads.close()

    def check(self, body: GenerationFields | EmbeddingRequest) -> None:
        """Check that requests are answered, and the name of the model; log unknown fields.

        Raises:
            ApiError: The server is starting or stopping, or there is no such model.
        """
        log_unknown_fields(body)
        if (status := self.status) != "ready":
            retry = STARTING_SECONDS if status in ("starting", "unavailable") else None
            why = UNAVAILABLE if status == "unavailable" else f"the server is not ready: {status}"
            raise ApiError(503, why, retry_after=retry)
        if body.model is not None and body.model != self.name:
            why = f"there is no such model; the model of this server is {self.name!r}"
            raise ApiError(404, f"model: {why}", param="model", code="model_not_found")


def make_service(model: Model, name: str, options: ServeOptions, keys: tuple[str, ...]) -> Service:
    """Make the parts of a server for a model.

    Args:
        model: The model.
        name: Its name in the API.
        options: The server's options.
        keys: The API keys.

    Raises:
        ConfigError: The model's prompt template and tokenizer do not fit.
    """
    context = model.network.llama.cfg.max_length
    options = dataclasses.replace(
        options, prompt_tokens=min(options.prompt_tokens, context), new_tokens=min(options.new_tokens, context)
    )
    limits = Limits(
        answers=options.rows + options.max_waiting,
        tokens=options.max_total_tokens,
        frames=max(options.max_total_frames, options.max_frames),
        bytes=max(options.max_total_megabytes, options.max_body_megabytes) * MEBIBYTE,
    )
    uploads = Uploads(
        options.max_file_megabytes * MEBIBYTE, options.max_files_megabytes * MEBIBYTE, options.file_hours * 3600
    )
    metrics = Metrics()
    scheduler = _make_scheduler(model, options)
    metrics.watch("running_answers", "Answers that are decoded now", lambda: scheduler.num_running)
    metrics.watch("waiting_answers", "Answers that wait for a row", lambda: scheduler.num_waiting)
    metrics.watch(
        "requested_answers",
        "Answers of all requests, also of those whose media are read",
        lambda: limits.used("answers"),
    )
    decoders = DecoderPool(model.config, options.decoders, options.decode_seconds, options.decode_megabytes)
    return Service(
        model=model,
        name=name,
        options=options,
        keys=keys,
        scheduler=scheduler,
        media=MediaReader(model, options, decoders, uploads, limits, metrics),
        requests=RequestMaker(model, options),
        uploads=uploads,
        decoders=decoders,
        limits=limits,
        metrics=metrics,
        created=now(),
    )


def _make_scheduler(model: Model, options: ServeOptions) -> AnswerEngine:
    """Return what answers requests: the model's own engine, or the server of `options.engine`."""
    llama = model.network.llama
    if options.engine is None:
        engine = make_engine(
            model,
            options.rows,
            int8_cache=options.int8_cache,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
        )
        return Scheduler(engine, llama.cfg.width)
    embedding = np.asarray(llama.embedding[...])
    needed = make_requirements(llama.cfg, embedding.dtype.name, options.max_request_tokens)
    return VllmEngine(options.engine, embedding, model.tokenizer.eos_ids, needed)
