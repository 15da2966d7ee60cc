"""The metrics of a server, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of a server.

    Attributes:
        requests: Responses by route and status.
        request_seconds: Time until a response was complete, by route.
        first_token_seconds: Time until the first tokens of an answer.
        prompt_tokens: Tokens of prompts.
        cached_tokens: Tokens of prompts whose keys and values were in the cache.
        new_tokens: Generated tokens.
        answers: Answers by the reason why they ended.
        media: Media files by kind, and whether they were encoded or cached.
        decode_seconds: Time to decode a media file, with the wait for a decoder.
        encode_seconds: Time to encode a media file, with the wait for the encoder.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("vllama_requests", "Responses", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "vllama_request_seconds",
            "Time until a response was complete",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "vllama_first_token_seconds", "Time until the first tokens", buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("vllama_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached_tokens = Counter("vllama_cached_prompt_tokens", "Tokens of prompts in the cache", registry=registry)
        self.new_tokens = Counter("vllama_generated_tokens", "Generated tokens", registry=registry)
        self.answers = Counter("vllama_answers", "Answers", ["finish_reason"], registry=registry)
        self.media = Counter("vllama_media_files", "Media files", ["kind", "source"], registry=registry)
        self.decode_seconds = Histogram(
            "vllama_decode_media_seconds", "Time to decode a media file", buckets=_SECONDS, registry=registry
        )
        self.encode_seconds = Histogram(
            "vllama_encode_media_seconds", "Time to encode a media file", buckets=_SECONDS, registry=registry
        )

    def watch(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read when the metrics are."""
        Gauge(f"vllama_{name}", description, registry=self._registry).set_function(read)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
