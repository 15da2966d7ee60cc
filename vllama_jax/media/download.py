"""Download media from http and https URLs that may come from an attacker.

A server passes URLs of its users to `open_url`, so this module is written against these threats:

- Access to this machine and its network (SSRF). All addresses of the host must be public (`addresses`), also after
  each redirect. Numeric forms of an address, such as 0x7f.1, are resolved first. Ports are not restricted. A connection
  to an address of this machine is closed before anything is sent, as its firewall does not filter it.
- DNS rebinding. A name is resolved once, and the connection is made to an address that was checked, not to the name.
- Proxies. They choose the address themselves, so those of the environment are not used.
- Exhausted resources. Size, time and redirects are limited, for streams without an end, servers that send a byte at a
  time, and wrong lengths. Only the time of the system's resolver, seconds as it is configured, is not interrupted.
- Compression bombs. A response with a content encoding is rejected; none is decompressed.
- Leaks. URLs with a user name or a password are rejected. Messages contain neither those, nor the query of a URL, which
  may be a signature, nor private addresses, nor text that a server sent. https is verified, and not left for http.
- Media that refer to other files or hosts, such as playlists. `files.open_container` does not open them.
- Local files. `open_url` takes nothing but URLs. `read_media` also takes paths, so a server passes it no text of users.
- Files that remain. The temporary file has no name on Linux, so that it ends with the process.

A network that translates public addresses to private hosts, or that has NAT64 prefixes of its own, needs a firewall.
"""

from __future__ import annotations

import contextlib
import http
import http.client
import io
import re
import socket
import ssl
import time
import urllib.parse
from collections.abc import Collection, Generator, Iterator
from typing import Any, NamedTuple

from vllama_jax.errors import MediaError
from vllama_jax.media.addresses import is_public
from vllama_jax.media.spool import format_size, spool

MAX_BYTES = 2 * 2**30
MAX_SECONDS = 600.0
MAX_REDIRECTS = 5
_IDLE_SECONDS = 30.0  # without a byte from the server
_CHUNK = 2**16  # bytes

_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?\.?|\[[0-9a-f:.]+\]", re.IGNORECASE)  # IPv6 in brackets
_SHOWN = re.compile(  # the parts of a URL that messages contain; a password may contain "@"
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://([^/?#]*@)?(?P<host>[\w.-]+(:\d*)?|\[[0-9a-f:.]+\](:\d*)?)(?P<path>(/[^?#]*)?)(?=[?#]|$)",
    re.IGNORECASE,
)
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f\\]")  # URL parsers disagree on them; a line break would be another header
_RESERVED = "/:?#[]@!$&'()*+,;=%~"  # characters of a URL that are not quoted


class _Target(NamedTuple):
    """Where a request goes.

    Attributes:
        scheme: "http" or "https".
        host: Host name or address, without brackets.
        port: From 1 to 65535.
        path: Path and query.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def host_header(self) -> str:
        """The value of the header Host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@contextlib.contextmanager
def open_url(
    url: str,
    *,
    max_bytes: int = MAX_BYTES,
    seconds: float = MAX_SECONDS,
    allowed_hosts: Collection[str] | None = None,
) -> Iterator[str]:
    """Download a file to a temporary file.

    Args:
        url: An http or https URL of a public host.
        max_bytes: The largest accepted size of the file.
        seconds: The time limit, for all redirects and the file together.
        allowed_hosts: The host names that are accepted, in lowercase, also after redirects; None for all public hosts.

    Yields:
        The path of the temporary file, which is valid in this process until the context ends.

    Raises:
        MediaError: The URL is invalid, its host is not public or not allowed, the server cannot be reached or does not
            send a complete file, or a limit is exceeded.

    Example:
        >>> from vllama_jax import media
        >>> from vllama_jax.media.download import open_url
        >>> with open_url("https://example.org/clip.mp4", max_bytes=10_000_000) as path:  # doctest: +SKIP
        ...     video = media.read_video(path)
    """
    name = describe_url(url)
    with spool(_download(url, name, max_bytes, seconds, allowed_hosts), name, max_bytes) as path:
        yield path


def describe_url(url: str) -> str:
    """Return a URL for messages: without user name, password, query and fragment, on one line."""
    parts = _SHOWN.match(url)
    if parts is None or (":" in parts["host"] and "@" in parts["path"]):
        return "the URL"  # what looks like the host and the path may be a password
    shown = f"{parts['scheme']}://{parts['host']}{parts['path']}"[:200]
    return "".join(character if character.isprintable() else "�" for character in shown)


def _download(
    url: str, name: str, max_bytes: int, seconds: float, allowed_hosts: Collection[str] | None
) -> Generator[bytes]:
    """Yield the content of the file at a URL; follow redirects."""
    deadline = time.monotonic() + seconds
    where = name
    try:
        target = _parse_url(url, where)
        for _ in range(MAX_REDIRECTS + 1):
            if allowed_hosts is not None and target.host.removesuffix(".") not in allowed_hosts:
                raise MediaError(f"{where}: this host is not allowed; upload the file instead")
            with _connect(target, where, deadline) as connection:
                response = _request(connection, target, deadline)
                if response.status not in _REDIRECTS:
                    yield from _read_body(response, where, max_bytes)
                    return
                url, previous = _join_location(url, response, where), target
            where = f"{name}: after a redirect"
            target = _parse_url(url, where)
            if (previous.scheme, target.scheme) == ("https", "http"):
                raise MediaError(f"{name}: redirects from https to http; pass the http URL if you trust the network")
        raise MediaError(f"{name}: redirects more than {MAX_REDIRECTS} times; pass the URL of the file itself")
    except TimeoutError as error:
        late = deadline - time.monotonic() < 0.1  # s; the wait may end slightly early
        why = f"not complete after {seconds:g} s" if late else f"the server sends nothing for {_IDLE_SECONDS:.0f} s"
        raise MediaError(f"{name}: {why}; download the file first") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MediaError(f"{name}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """Return what is wrong, and what to do, without text that a server sent."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not valid ({error.verify_message}); check the host name"
    if isinstance(error, ssl.SSLError):
        return f"the encrypted connection failed ({error.reason}); check the URL"
    if isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected):
        return "the server closed the connection before the end of the file; try again"
    if isinstance(error, OSError):
        why = error.strerror or type(error).__name__
        return f"the connection failed ({why}); check the URL and the network (proxies are not used)"
    return "the server's response is not valid HTTP; check the URL"


def _parse_url(url: str, name: str) -> _Target:
    """Split a URL. The name is for messages."""
    if _FORBIDDEN.search(url):
        raise MediaError(f"{name}: the URL contains a space, a backslash or a control character; quote it as %20 or so")
    try:
        parts = urllib.parse.urlsplit(url)
        port, host = parts.port, (parts.hostname or "").encode("idna").decode()
    except ValueError as error:  # a port, brackets or a host name
        raise MediaError(f"{name}: not a valid URL; check it") from error
    if parts.scheme not in _PORTS:
        raise MediaError(f"{name}: only http:// and https:// can be downloaded; download the file first")
    if "@" in parts.netloc:
        raise MediaError(f"{name}: the URL contains a user name or a password; download the file first")
    if not _HOST.fullmatch(f"[{host}]" if ":" in host else host) or port == 0:
        raise MediaError(f"{name}: not a valid URL: its host or port is invalid; check it")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Target(parts.scheme, host, port or _PORTS[parts.scheme], urllib.parse.quote(path, safe=_RESERVED))


@contextlib.contextmanager
def _connect(target: _Target, name: str, deadline: float) -> Iterator[socket.socket]:
    """Connect to an address of the host that was checked: the first that accepts a connection."""
    addresses = _resolve(target.host, target.port)
    if not addresses or not all(map(is_public, addresses)):
        raise MediaError(_not_public(name))
    failure: OSError = ConnectionError()
    for address in addresses:
        try:
            connection = _dial(address, target.port, name, _time_left(deadline))
            break
        except OSError as error:
            failure = error
    else:
        raise failure
    with connection:
        connection.settimeout(_time_left(deadline))
        if target.scheme == "http":
            yield connection
            return
        with ssl.create_default_context().wrap_socket(connection, server_hostname=target.host) as encrypted:
            yield encrypted


def _resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host, in the order in which to try them."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _dial(address: str, port: int, name: str, timeout: float) -> socket.socket:
    """Connect to an address, which is not resolved again."""
    connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect((address, port))
        if connection.getsockname()[0] == connection.getpeername()[0]:
            raise MediaError(_not_public(name))
    except BaseException:
        connection.close()
        raise
    return connection


def _not_public(name: str) -> str:
    return f"{name}: the host is not public; only public hosts are accepted, so download the file first"


def _request(connection: socket.socket, target: _Target, deadline: float) -> http.client.HTTPResponse:
    """Send the request, and read the headers of the response."""
    client = http.client.HTTPConnection(target.host, target.port)
    client.auto_open, client.sock = 0, connection  # never connects by itself
    headers = {
        "Host": target.host_header,
        "User-Agent": "vllama_jax",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    client.request("GET", target.path, headers=headers)
    response = http.client.HTTPResponse(_ResponseSource(connection, deadline), method="GET")  # type: ignore[arg-type]
    response.begin()
    return response


class _ResponseSource:
    """The part of a socket that `http.client.HTTPResponse` uses."""

    def __init__(self, connection: socket.socket, deadline: float):
        self._reader = _DeadlineReader(connection, deadline)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the file that the response is read from."""
        return io.BufferedReader(self._reader, _CHUNK)


class _DeadlineReader(io.RawIOBase):
    """Read from a socket until a deadline, however slowly the bytes arrive."""

    def __init__(self, connection: socket.socket, deadline: float):
        self._connection, self._deadline = connection, deadline

    def readable(self) -> bool:
        """Return True, as `io.BufferedReader` requires."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has arrived, at least a byte unless the connection is closed."""
        self._connection.settimeout(_time_left(self._deadline))
        return self._connection.recv_into(buffer)

    def readall(self) -> bytes:
        """Raise HTTPException: `http.client` reads without a limit only for a chunk of the size -1."""
        raise http.client.HTTPException("a chunk of negative size")


def _read_body(response: http.client.HTTPResponse, name: str, max_bytes: int) -> Iterator[bytes]:
    """Yield the content of a response, if it is that of a file."""
    if response.status != http.HTTPStatus.OK:
        raise MediaError(f"{name}: the server answers {_format_status(response.status)}; check the URL")
    if response.getheader("Content-Encoding", "identity").strip().lower() not in ("identity", ""):
        raise MediaError(f"{name}: the server sends a compressed file; download the file first")
    if response.headers.get_content_type() == "text/html":
        raise MediaError(f"{name}: a web page, not a media file; pass the URL of the file itself")
    length, received = response.length, 0
    if length is not None and length > max_bytes:
        why = f"{format_size(length)} are larger than the limit of {format_size(max_bytes)}"
        raise MediaError(f"{name}: {why}; pass a shorter or smaller file")
    while chunk := response.read(_CHUNK):
        received += len(chunk)
        yield chunk
    if length is not None and received < length:
        why = f"the server closed the connection after {received:,} of {length:,} bytes"
        raise MediaError(f"{name}: {why}; try again")


def _join_location(url: str, response: http.client.HTTPResponse, name: str) -> str:
    """Return the URL that a redirect leads to."""
    location = response.getheader("Location")
    if not location:
        raise MediaError(f"{name}: the server redirects without an address; pass the URL of the file itself")
    try:
        return urllib.parse.urljoin(url, location.encode("latin-1", "replace").decode("utf-8", "replace"))
    except ValueError as error:
        raise MediaError(f"{name}: after a redirect: not a valid URL; pass the URL of the file itself") from error


def _format_status(status: int) -> str:
    """Return a status with its standard phrase: the server's own is not shown."""
    known = {known.value: known.phrase for known in http.HTTPStatus}
    return f"{status} {known.get(status, '')}".strip()


def _time_left(deadline: float) -> float:
    """Return for how long to wait for the next bytes. Raise TimeoutError after the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, _IDLE_SECONDS)
