"""What every request passes before a route: host, origin, key, type and size of the body; and what is counted of it."""

import asyncio
import hashlib
import hmac
import time
import urllib.parse
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllama_jax.serve.errors import ApiError, make_response
from vllama_jax.serve.limits import Limits
from vllama_jax.serve.metrics import Metrics
from vllama_jax.serve.options import LOOPBACK_HOSTS, MEBIBYTE, ServeOptions

IDLE_SECONDS = 30.0  # without a byte of a body
UPLOAD_ROUTE = "/v1/files"
PROTECTED = ("/v1/", "/metrics", "/page/")  # routes that need a key, if there are keys
_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", UPLOAD_ROUTE, "/health")


class Gate:
    """Checks requests before a route reads them.

    A server that listens on a loopback address accepts only requests that are addressed to it by such a name, and no
    server accepts requests from web pages of other origins that are not allowed. Otherwise any page that a user visits
    could use a server of that user, also one without keys.

    Args:
        app: The app behind the gate.
        options: The server's options.
        keys: The API keys; none if everyone is answered.
        limits: The totals of all requests.
        metrics: The metrics.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions, keys: tuple[str, ...], limits: Limits, metrics: Metrics):
        self._app, self._options, self._limits, self._metrics = app, options, limits, metrics
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._hosts = {*LOOPBACK_HOSTS, options.host, *options.allow_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on, or respond with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        body = _Body(receive, self._find_limit(scope), self._limits)
        try:
            try:
                owner = self._check(scope)
                body.check_length(_headers(scope))
            except ApiError as error:
                await make_response(error)(scope, receive, send_and_note)
                return
            scope.setdefault("state", {})["owner"] = owner
            await self._app(scope, body.receive, send_and_note)
        finally:
            body.release()
            path = scope["path"]
            route = next((route for route in _ROUTES if path == route or path.startswith(f"{route}/")), "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.request_seconds.labels(route).observe(time.monotonic() - start)

    def _check(self, scope: Scope) -> str:
        """Return whose request it is, or raise ApiError."""
        headers = _headers(scope)
        host = headers.get("host", "").lower()
        if self._options.is_local and _host_name(host) not in self._hosts:
            raise ApiError(403, "the server is not addressed by this host name; use localhost, or --allow-hosts")
        origin = headers.get("origin", "").lower()
        is_own = urllib.parse.urlsplit(origin).netloc == host
        if origin and not is_own and origin not in self._options.allow_origins:
            raise ApiError(403, "web pages of this origin may not call the server; use --allow-origins")
        owner = self._check_key(headers) if self._keys and scope["path"].startswith(PROTECTED) else ""
        is_json = headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
        if scope["method"] == "POST" and scope["path"] != UPLOAD_ROUTE and not is_json:
            raise ApiError(415, "the body must be JSON; set Content-Type to application/json")
        return owner

    def _check_key(self, headers: Mapping[str, str]) -> str:
        """Return a name for the key of a request. All keys are compared, each in constant time."""
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if kind.lower() != "bearer" or not any(matches):
            raise ApiError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")
        return given.hex()

    def _find_limit(self, scope: Scope) -> int | None:
        """Return the largest body of a request in bytes; None for an upload, which has limits of its own."""
        if scope["path"] == UPLOAD_ROUTE:
            return None
        return self._options.max_body_megabytes * MEBIBYTE


class _Body:
    """The body of a request, whose bytes are limited and counted, and for which no one waits forever."""

    def __init__(self, receive: Receive, limit: int | None, limits: Limits):
        self._receive, self._limit, self._limits = receive, limit, limits
        self._taken, self._is_complete = 0, False

    def check_length(self, headers: Mapping[str, str]) -> None:
        """Raise ApiError if the declared length is too large."""
        length = headers.get("content-length", "")
        if length.isdecimal() and self._limit is not None and int(length[:20]) > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        """Return the next message, as the server's `receive` does."""
        if self._is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                message = await self._receive()
        except TimeoutError as error:
            raise ApiError(408, f"the body does not arrive: no byte for {IDLE_SECONDS:.0f} s") from error
        if message["type"] == "http.request":
            self._is_complete = not message.get("more_body", False)
            if self._limit is not None:
                self._take(len(message.get("body", b"")))
        return message

    def release(self) -> None:
        """Count the bytes no longer, because the response is complete."""
        self._limits.give_back(bytes=self._taken)
        self._taken = 0

    def _take(self, size: int) -> None:
        assert self._limit is not None
        if self._taken + size > self._limit:
            raise self._too_large()
        self._limits.take(bytes=size)
        self._taken += size

    def _too_large(self) -> ApiError:
        megabytes = (self._limit or 0) // MEBIBYTE
        return ApiError(413, f"the body is larger than the limit of {megabytes} MiB; upload the files to /v1/files")


def _headers(scope: Scope) -> Mapping[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _host_name(host: str) -> str:
    """Return the value of the header Host without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host
