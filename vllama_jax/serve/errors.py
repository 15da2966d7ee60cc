"""Errors of the API, in the shape of OpenAI's: status, message, type, parameter and code.

Messages contain no path of the server and no traceback.
"""

import itertools
import logging
import traceback
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

logger = logging.getLogger(__name__)

CLIENT_CLOSED = 499  # as in nginx's logs; nobody receives it

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    415: "unsupported_media_type",
    422: "unusable_media",
    429: "rate_limit_exceeded",
    503: "unavailable",
}
_MESSAGES = {404: "there is no such route; docs/serving.md lists them", 405: "the route has no such method"}


class ApiError(HTTPException):
    """A request that is refused.

    Args:
        status: The HTTP status.
        message: What is wrong and what to do, on one line.
        param: The field of the request that is wrong, such as "messages[0].content[1]".
        code: A short name of the error; by default that of the status.
        retry_after: After how many seconds to try again, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        return make_body(self.status_code, self.detail, self.param, self.code)


def make_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the JSON object of an error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message = " ".join(message.encode("utf-8", "replace").decode().split())  # a client's text may be part of it
    code = code or _CODES.get(status, "internal_error" if status >= 500 else "invalid_request")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def make_response(error: HTTPException) -> JSONResponse:
    """Return the response for an error."""
    headers: Mapping[str, str] | None = error.headers
    if isinstance(error, ApiError):
        return JSONResponse(error.body, error.status_code, headers)
    message = _MESSAGES.get(error.status_code, "the request cannot be read; check its headers and its body")
    return JSONResponse(make_body(error.status_code, message), error.status_code, headers)


def log_failure(error: BaseException) -> None:
    """Log an error of the server itself with its traceback, which no response contains."""
    logger.error("internal error\n" + "".join(traceback.format_exception(error)).rstrip())


def add_error_handlers(app: FastAPI) -> None:
    """Make all errors of an app JSON objects in the shape of OpenAI's."""

    @app.exception_handler(HTTPException)
    async def respond(request: Request, error: HTTPException) -> JSONResponse:
        return make_response(error)

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
        return make_response(_explain_validation(error))

    @app.exception_handler(ClientDisconnect)
    async def end(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        log_failure(error)
        return JSONResponse(make_body(500, "internal error; the server's log has the details"), 500)


def _explain_validation(error: RequestValidationError) -> ApiError:
    """Return the first invalid field and the reason. The value is not repeated: it may be a file."""
    first = max(error.errors(), key=lambda one: len(one["loc"]))  # of the alternatives of a field, the closest
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON; check it")
    path = ""
    for previous, part in itertools.pairwise(first["loc"]):  # the first is "body", "path" or "query"
        if part == previous:
            continue  # the type of a content part, and its field of the same name
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and not part.endswith(("Part", "Request")):
            path += f".{part}" if path else part
    reason = first["msg"][0].lower() + first["msg"][1:]
    return ApiError(400, f"{path or 'body'}: {reason}"[:500], param=path or None)
