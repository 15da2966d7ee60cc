"""Downloads from URLs that may be an attacker's: one test, or more, for each threat that media/download.py lists."""

import contextlib
import datetime
import ipaddress
import os
import random
import re
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import vllama_jax as vl
from vllama_jax import cli
from vllama_jax.media import addresses, download, read_media, spool
from vllama_jax.media.download import describe_url, open_url

PUBLIC, OTHER = "93.184.216.34", "2606:2800:220:1::1"
NOT_PUBLIC = "the host is not public; only public hosts are accepted, so download the file first"
Responder = Callable[[socket.socket], None]


class Internet:
    """A server on 127.0.0.1 that stands for all public hosts, and the names that the resolver knows.

    Attributes:
        names: The addresses of each host name; a list of lists for answers that change.
        responses: What the server sends, by request target.
        requests: The requests that it has received.
        dialed: The addresses and ports to which connections were made.
        tls: The server's context for https; None for http.
    """

    def __init__(self):
        self.names: dict[str, list] = {"media.example": [PUBLIC]}
        self.responses: dict[str, bytes | Responder] = {}
        self.requests: list[str] = []
        self.dialed: list[tuple[str, int]] = []
        self.tls: ssl.SSLContext | None = None
        internet = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                internet.answer(self.request)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if self.tls:
                connection = stack.enter_context(self.tls.wrap_socket(connection, server_side=True))
            request = b""
            while b"\r\n\r\n" not in request and (received := connection.recv(4096)):
                request += received
            self.requests.append(request.decode())
            response = self.responses[request.split()[1].decode()]
            if callable(response):
                response(connection)
            else:
                connection.sendall(response)

    def dial(self, address: str, port: int, name: str, timeout: float) -> socket.socket:
        """Replace `download._dial`: connect to the server in place of the address."""
        assert addresses.is_public(address)
        self.dialed.append((address, port))
        connection = socket.socket()
        connection.settimeout(timeout)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def resolve(self, host: str, port: int, **options: object) -> list[tuple]:
        """Replace `socket.getaddrinfo`."""
        found = self.names[host]
        found = found.pop(0) if found and isinstance(found[0], list) else found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]


@pytest.fixture
def internet(monkeypatch) -> Iterator[Internet]:
    made = Internet()
    monkeypatch.setattr(download, "_dial", made.dial)
    monkeypatch.setattr(socket, "getaddrinfo", made.resolve)
    yield made
    made.server.shutdown()
    made.server.server_close()


def response(body: bytes = b"", *headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "\r\n"]).encode() + body


def sized(body: bytes, *headers: str) -> bytes:
    return response(body, f"Content-Length: {len(body)}", *headers)


def redirect(location: str, status: str = "302 Found") -> bytes:
    return response(b"", f"Location: {location}", "Content-Length: 0", status=status)


def download_all(url: str, **limits: float) -> bytes:
    with open_url(url, **limits) as path, open(path, "rb") as file:
        return file.read()


def refusal(url: str, **limits: float) -> str:
    """Return the message of a download that fails: one line, which begins with the URL."""
    with pytest.raises(vl.MediaError) as refused:
        download_all(url, **limits)
    message = str(refused.value)
    assert message.startswith(f"{describe_url(url)}: ")
    assert "\n" not in message
    return message.removeprefix(f"{describe_url(url)}: ")


def test_a_file_is_requested_with_nothing_but_its_url(internet):
    internet.responses["/a%20b.mp4?size=1&sign=x%2Fy"] = sized(b"content")
    assert download_all("http://media.example/a%20b.mp4?size=1&sign=x%2Fy#part") == b"content"
    lines = internet.requests[0].split("\r\n")
    assert lines[0] == "GET /a%20b.mp4?size=1&sign=x%2Fy HTTP/1.1"
    assert {line.partition(":")[0] for line in lines[1:] if line} == {
        *("Host", "User-Agent", "Accept", "Accept-Encoding", "Connection")
    }
    assert "Host: media.example" in lines
    assert "Accept-Encoding: identity" in lines


def test_media_at_a_url_are_those_of_the_file(internet, clip):
    internet.responses["/clip.mp4?token=secret"] = sized(clip.read_bytes(), "Content-Type: text/plain")
    url = "http://media.example/clip.mp4?token=secret"
    found, expected = read_media(url, allow_url=True), read_media(clip)
    assert (found.frames == expected.frames).all()
    assert (found.waveform == expected.waveform).all()
    assert found.report.path == "http://media.example/clip.mp4"
    with pytest.raises(vl.MediaError) as refused:
        read_media(url)
    assert str(refused.value) == (
        "http://media.example/clip.mp4: URLs are downloaded only with --allow-url, in Python with allow_url=True"
    )
    assert len(internet.requests) == 1


def test_a_path_of_a_download_ends_with_it(internet):
    internet.responses["/a"] = sized(b"content")
    with open_url("http://media.example/a") as path:
        assert os.path.exists(path)
        identity = os.stat(path).st_ino, os.stat(path).st_dev
    with contextlib.suppress(FileNotFoundError):  # another file may have its descriptor now
        assert (os.stat(path).st_ino, os.stat(path).st_dev) != identity


@pytest.mark.parametrize("port", [8123, 22, 65535])
def test_ports_are_not_restricted(internet, port):
    internet.responses["/a"] = sized(b"content")
    assert download_all(f"http://media.example:{port}/a") == b"content"
    assert internet.dialed == [(PUBLIC, port)]
    assert f"Host: media.example:{port}\r\n" in internet.requests[0]


def test_international_names_and_paths_are_encoded(internet):
    internet.names["xn--bcher-kva.example"] = [OTHER]
    internet.responses["/%C3%A9t%C3%A9.mp4"] = sized(b"content")
    assert download_all("http://bücher.example/été.mp4") == b"content"
    assert internet.dialed == [(OTHER, 80)]


PRIVATE = [
    *("0.0.0.0", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.8.8.8", "168.63.129.16", "169.254.1.1"),
    *("169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.0.1"),
    *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::7f00:1", "fe80::1", "fe80::1%1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "100::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:10.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::a9fe:a9fe"),
    *("64:ff9b:1::808:808", "2001::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:a00:1::1", "3fff::1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address):
    assert not addresses.is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *(PUBLIC, OTHER, "1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255"),
        *("172.15.255.255", "172.32.0.0", "192.0.1.0", "198.17.255.255", "198.20.0.0", "223.255.255.255"),
        *("2001:4860:4860::8888", "2a00::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"),
    ],
)
def test_public_addresses(address):
    assert addresses.is_public(address)


def test_no_address_is_public_that_the_standard_library_takes_for_private():
    draw = random.Random(0)
    for _ in range(5000):
        for address in (ipaddress.IPv4Address(draw.getrandbits(32)), ipaddress.IPv6Address(draw.getrandbits(128))):
            if addresses.is_public(str(address)) and getattr(address, "sixtofour", None) is None:
                assert address.is_global, address
                assert not address.is_multicast, address


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0", "[::1]", "[::]", "[::ffff:127.0.0.1]"),
        *("[64:ff9b::7f00:1]", "169.254.169.254", "100.64.1.1", "10.1.2.3", "１２７.0.0.1", "127。0。0。1"),
    ],
)
def test_private_hosts_are_not_dialed(monkeypatch, host):
    """The numeric forms are those that the system's resolver accepts."""
    monkeypatch.setattr(download, "_dial", lambda *_: pytest.fail("dialed"))
    with pytest.raises(vl.MediaError, match="the host is not public"):
        download_all(f"http://{host}:8080/latest/meta-data")


@pytest.mark.parametrize("private", ["127.0.0.1", "10.0.0.1", "::1", "fe80::1"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_name_with_a_public_and_a_private_address_is_not_dialed(internet, private, order):
    internet.names["media.example"] = [PUBLIC, private][::order]
    assert refusal("http://media.example/a") == NOT_PUBLIC
    assert internet.dialed == []


def test_a_name_without_addresses_is_one_line(internet, monkeypatch):
    internet.names["media.example"] = []
    assert refusal("http://media.example/a") == NOT_PUBLIC

    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert refusal("http://media.example/a").startswith("the connection failed (Name or service not known);")


def test_a_name_is_resolved_once_and_its_address_is_dialed(internet):
    """DNS rebinding: a second look-up would return a private address."""
    internet.names["media.example"] = [[PUBLIC], ["127.0.0.1"]]
    internet.responses["/a"] = sized(b"content")
    assert download_all("http://media.example/a") == b"content"
    assert internet.dialed == [(PUBLIC, 80)]
    assert internet.names["media.example"] == [["127.0.0.1"]]


def test_a_redirect_to_the_same_name_is_checked_again(internet):
    internet.names["media.example"] = [[PUBLIC], ["127.0.0.1"]]
    internet.responses["/a"] = redirect("/b")
    assert refusal("http://media.example/a") == f"after a redirect: {NOT_PUBLIC}"
    assert len(internet.dialed) == 1


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("http://intranet.example/secret", f"after a redirect: {NOT_PUBLIC}"),
        ("//intranet.example/secret", f"after a redirect: {NOT_PUBLIC}"),
        ("file:///etc/passwd", "after a redirect: only http:// and https:// can be downloaded"),
        ("ftp://media.example/a", "after a redirect: only http:// and https:// can be downloaded"),
        ("http://me:hidden@media.example/a", "after a redirect: the URL contains a user name or a password"),
        ("http://media.example:0/", "after a redirect: not a valid URL"),
        ("http://[::1", "after a redirect: not a valid URL"),
        ("http://media.example/a b", "after a redirect: the URL contains a space"),
        ("", "the server redirects without an address"),
    ],
)
def test_redirects_are_checked_like_the_url(internet, location, why):
    internet.names["intranet.example"] = ["10.0.0.7"]
    internet.responses["/a"] = redirect(location)
    message = refusal("http://media.example/a")
    assert message.startswith(why)
    assert not any(secret in message for secret in ("secret", "passwd", "hidden", "10.0.0.7"))
    assert internet.dialed == [(PUBLIC, 80)]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_followed(internet, status):
    internet.names["cdn.example"] = [OTHER]
    internet.responses |= {"/a": redirect("http://cdn.example/files/b", status), "/files/b": redirect("c", status)}
    internet.responses["/files/c"] = sized(b"content")
    assert download_all("http://media.example/a") == b"content"
    assert [address for address, _ in internet.dialed] == [PUBLIC, OTHER, OTHER]
    assert "Host: cdn.example\r\n" in internet.requests[1]


def test_at_most_five_redirects(internet):
    internet.responses |= {f"/{number}": redirect(f"/{number + 1}") for number in range(9)}
    assert refusal("http://media.example/0") == "redirects more than 5 times; pass the URL of the file itself"
    assert len(internet.requests) == 6
    internet.responses["/5"] = sized(b"content")
    assert download_all("http://media.example/0") == b"content"


def test_an_address_of_this_machine_is_refused_after_connecting():
    """A public address of this machine is not in any list; the connection shows that both ends are here."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(vl.MediaError, match="the host is not public"):
            download._dial("127.0.0.1", server.getsockname()[1], "url", 5)
        connection, _ = server.accept()
        with connection:
            assert connection.recv(100) == b""


def test_the_next_address_is_tried_if_one_refuses(internet, monkeypatch):
    internet.names["media.example"] = [OTHER, PUBLIC]
    internet.responses["/a"] = sized(b"content")

    def dial(address, *rest):
        if address == OTHER:
            raise ConnectionRefusedError(111, "Connection refused")
        return internet.dial(address, *rest)

    monkeypatch.setattr(download, "_dial", dial)
    assert download_all("http://media.example/a") == b"content"
    internet.names["media.example"] = [OTHER]
    message = refusal("http://media.example/a")
    assert message == "the connection failed (Connection refused); check the URL and the network (proxies are not used)"


def test_proxies_of_the_environment_are_not_used(internet, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://10.0.0.1:3128")
    internet.responses["/a"] = sized(b"content")
    assert download_all("http://media.example/a") == b"content"
    assert internet.dialed == [(PUBLIC, 80)]


def send_forever(start: bytes, chunk: bytes, pause: float = 0.0) -> Responder:
    def respond(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(chunk)
            time.sleep(pause)

    return respond


@pytest.mark.parametrize(
    ("start", "chunk"),
    [
        (response(), bytes(2**16)),
        (response(b"", "Transfer-Encoding: chunked"), b"10000\r\n" + bytes(2**16) + b"\r\n"),
        (response(b"", "Transfer-Encoding: chunked"), b"1\r\n.\r\n" * 1000),
        (response(b"ffffffff\r\n", "Transfer-Encoding: chunked"), bytes(2**16)),
    ],
    ids=["unknown length", "chunks", "small chunks", "large chunk"],
)
def test_a_stream_without_an_end_stops_at_the_size_limit(internet, start, chunk):
    internet.responses["/a"] = send_forever(start, chunk)
    message = refusal("http://media.example/a", max_bytes=300_000)
    assert message == "larger than the limit of 293.0 KiB; pass a shorter or smaller file"


def test_a_declared_length_above_the_limit_is_refused_before_the_content(internet):
    internet.responses["/a"] = response(b"", "Content-Length: 5000000000")
    message = refusal("http://media.example/a")
    assert message == "4.7 GiB are larger than the limit of 2.0 GiB; pass a shorter or smaller file"


@pytest.mark.parametrize("size", ["-1", "-5", "xyz", "1" * 70_000], ids=["-1", "-5", "text", "long"])
def test_a_chunk_of_invalid_size_does_not_fill_the_memory(internet, size):
    """`http.client` takes the size -1 for a request to read until the end."""
    start = response(f"{size}\r\n".encode(), "Transfer-Encoding: chunked")
    internet.responses["/a"] = send_forever(start, bytes(2**16))
    begun = time.monotonic()
    assert refusal("http://media.example/a", seconds=20).startswith(
        ("the server's response is not valid", "the server")
    )
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("start", "chunk"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (response(b"", "Content-Length: 1000000"), b"x"),
        (response(b"", "Transfer-Encoding: chunked"), b"1\r\nx\r\n"),
        (response(b"1\r\nx\r\n0\r\n", "Transfer-Encoding: chunked"), b"Trailer: x\r\n"),
    ],
    ids=["status", "header", "continue", "body", "chunks", "trailers"],
)
def test_a_slow_server_stops_at_the_time_limit(internet, start, chunk):
    internet.responses["/a"] = send_forever(start, chunk, pause=0.02)
    begun = time.monotonic()
    assert refusal("http://media.example/a", seconds=0.6) == "not complete after 0.6 s; download the file first"
    assert time.monotonic() - begun < 5


def test_a_server_that_sends_nothing_is_not_waited_for(internet, monkeypatch):
    monkeypatch.setattr(download, "_IDLE_SECONDS", 0.2)
    for start in (b"", response(b"12345", "Content-Length: 10")):
        internet.responses["/a"] = lambda connection, start=start: (connection.sendall(start), time.sleep(5))
        assert refusal("http://media.example/a") == "the server sends nothing for 0 s; download the file first"


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "x-unknown"])
def test_a_compressed_response_is_refused(internet, encoding):
    internet.responses["/a"] = sized(b"\x1f\x8b", f"Content-Encoding: {encoding}")
    assert refusal("http://media.example/a") == "the server sends a compressed file; download the file first"


def test_a_length_that_is_too_large_or_too_small(internet, clip):
    internet.responses["/a"] = response(b"12345", "Content-Length: 10")
    message = "the server closed the connection after 5 of 10 bytes; try again"
    assert refusal("http://media.example/a") == message
    content = clip.read_bytes()
    internet.responses["/b"] = response(content, f"Content-Length: {len(content) // 2}")
    with pytest.raises(vl.MediaError, match=r"^http://media.example/b: the mp4 is truncated"):
        read_media("http://media.example/b", allow_url=True)
    internet.responses["/c"] = response(b"5\r\n12345\r\n9\r\n123", "Transfer-Encoding: chunked")
    assert refusal("http://media.example/c").startswith("the server closed the connection before the end of the file")


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (response(b"", status="404 <b>Gone fishing</b>"), "the server answers 404 Not Found; check the URL"),
        (response(b"", status="500 x"), "the server answers 500 Internal Server Error; check the URL"),
        (response(b"", status="206 x"), "the server answers 206 Partial Content; check the URL"),
        (response(b"", status="799 x"), "the server answers 799; check the URL"),
        (sized(b"<html>", "Content-Type: text/html; charset=utf-8"), "a web page, not a media file"),
        (sized(b""), "the file is empty"),
        (b"", "the server closed the connection before the end of the file; try again"),
        (b"SSH-2.0-fishing\r\n", "the server's response is not valid HTTP; check the URL"),
        (b"HTTP/1.1 fishing\r\n\r\n", "the server's response is not valid HTTP; check the URL"),
        (response(b"", *["X: fishing"] * 200), "the server's response is not valid HTTP; check the URL"),
        (response(b"", "X: " + "x" * 70_000), "the server's response is not valid HTTP; check the URL"),
    ],
)
def test_responses_without_a_file_are_one_line(internet, sent, why):
    internet.responses["/a"] = sent
    message = refusal("http://media.example/a")
    assert message.startswith(why)
    assert "fishing" not in message


@pytest.mark.parametrize(
    "content",
    [
        b"no media " * 50,
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    ],
    ids=["text", "hls", "concat"],
)
def test_content_that_is_not_media(internet, content):
    """Playlists, which could make FFmpeg read other files and hosts, are not opened."""
    internet.responses["/a"] = sized(content, "Content-Type: video/mp4")
    with pytest.raises(vl.MediaError) as refused:
        read_media("http://media.example/a", allow_url=True)
    assert str(refused.value).startswith("http://media.example/a: not a video, image or audio file that can be read")
    assert len(internet.requests) == 1


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("file:///etc/passwd", "only http:// and https:// can be downloaded"),
        ("ftp://media.example/a", "only http:// and https:// can be downloaded"),
        ("gopher://media.example/a", "only http:// and https:// can be downloaded"),
        ("http://me:hidden@media.example/a", "the URL contains a user name or a password"),
        ("http://me@media.example/a", "the URL contains a user name or a password"),
        ("http://@media.example/a", "the URL contains a user name or a password"),
        ("http://media.example/a b", "the URL contains a space"),
        ("http://media.example/a\r\nHost: other", "the URL contains a space"),
        ("http://media.example\\@other/a", "the URL contains a space, a backslash"),
        ("http://media.example:99999/", "not a valid URL"),
        ("http://media.example:x/", "not a valid URL"),
        ("http://media.example:0/", "not a valid URL"),
        ("http:///a", "not a valid URL"),
        ("http:/a", "not a valid URL"),
        ("http://[::1/", "not a valid URL"),
        ("http://[fe80::1%25eth0]/", "not a valid URL"),
        ("http://media%2eexample/", "not a valid URL"),
        ("http://-media.example/", "not a valid URL"),
        (f"http://{'x' * 64}.example/", "not a valid URL"),
        ("http://media.example:80:90/", "not a valid URL"),
    ],
)
def test_urls_that_are_refused_before_the_name_is_resolved(internet, url, why):
    message = refusal(url)
    assert message.startswith(why)
    assert "hidden" not in message
    assert internet.dialed == []


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://media.example/a.mp4", "https://media.example/a.mp4"),
        ("https://media.example:8443/a.mp4?sign=secret#x", "https://media.example:8443/a.mp4"),
        ("https://me:secret@media.example/a", "https://media.example/a"),
        ("https://me:sec@ret@media.example", "https://media.example"),
        ("https://me:sec/ret@media.example/a", "the URL"),
        ("https://me:123/secret@media.example/a", "the URL"),
        ("https://me:sec?secret@media.example/a", "the URL"),
        ("https:/me:secret@media.example/a", "the URL"),
        ("https://[2606::1]:80/a", "https://[2606::1]:80/a"),
        ("https://media.example/a\nb\x1b[2J", "https://media.example/a�b�[2J"),
        ("https://media.example/" + "a" * 500, "https://media.example/" + "a" * 178),
    ],
)
def test_messages_show_no_secrets(url, shown):
    assert describe_url(url) == shown


def test_a_full_disk_is_one_line(internet, monkeypatch):
    monkeypatch.setattr(spool, "_open_temporary_file", lambda name: open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    internet.responses["/a"] = sized(b"content")
    message = refusal("http://media.example/a")
    assert message.startswith("cannot be stored in ")
    assert message.endswith("(No space left on device); set TMPDIR to a folder with more space")


def self_signed(folder, name: str) -> ssl.SSLContext:
    """Write a certificate for a host name to `folder`, and return a server's context with it."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


def test_https_verifies_the_name_of_the_url(internet, tmp_path, monkeypatch):
    internet.tls = self_signed(tmp_path, "media.example")
    asked = []
    internet.tls.sni_callback = lambda _, name, __: asked.append(name)
    internet.responses |= {"/a": sized(b"content"), "/b": redirect("http://media.example/a")}
    assert refusal("https://media.example/a").startswith(
        "the server's certificate is not valid (self-signed certificate)"
    )
    assert internet.requests == []
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    assert download_all("https://media.example/a") == b"content"
    assert asked == ["media.example"] * 2
    assert internet.dialed[-1] == (PUBLIC, 443)
    assert "Host: media.example\r\n" in internet.requests[0]
    assert refusal("https://media.example/b").startswith("redirects from https to http;")
    internet.names["other.example"] = [PUBLIC]
    assert refusal("https://other.example/a").startswith("the server's certificate is not valid (Hostname mismatch")
    internet.answer = lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert refusal("https://media.example/a").startswith("the encrypted connection failed (")


def test_a_chat_about_a_url(internet, clip, tiny_model, capsys):
    internet.responses["/clip.mp4?token=secret"] = sized(clip.read_bytes())
    argv = ["chat", "http://media.example/clip.mp4?token=secret", "What?", "--model", str(tiny_model), "--allow-url"]
    cli.main([*argv, "--max-new-tokens", "2"])
    assert capsys.readouterr().err == "http://media.example/clip.mp4: 8 frames of 3.0 s; audio used\n"
    assert len(internet.requests) == 1


def attempt(function: Callable[[], object]) -> object:
    """Return the result of a function, or the message of its MediaError."""
    try:
        return function()
    except vl.MediaError as error:
        return str(error)


def test_any_response_is_a_file_or_one_line(monkeypatch):
    """Random changes of valid responses: no other exception, and no wait for what does not come."""
    draw = random.Random(0)
    valid = [
        sized(b"content", "Content-Type: video/mp4"),
        response(b"7\r\ncontent\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        redirect("http://media.example/b"),
        redirect("//media.example:80/b?c=d"),
    ]
    inserted = [b"\r\n", b"\0", b"-1", b"\xff", b":", b"9" * 50, b"[", b"@", b" ", b"%", b"0x", b";"]

    def dial(*_: object) -> socket.socket:
        content = bytearray(draw.choice(valid))
        for _ in range(draw.randrange(4)):
            at = draw.randrange(len(content))
            content[at : at + draw.randrange(3)] = draw.choice(inserted)
        client, server = socket.socketpair()
        stack.enter_context(server).sendall(content)
        server.shutdown(socket.SHUT_WR)
        return client

    monkeypatch.setattr(download, "_dial", dial)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (PUBLIC, 80))])
    results = set()
    for _ in range(1000):
        with contextlib.ExitStack() as stack:
            results.add(attempt(lambda: download_all("http://media.example/a", seconds=5, max_bytes=100)))
    messages = {result for result in results if isinstance(result, str)}
    assert len(messages) > 8
    assert b"content" in results
    assert all(message.startswith("http://media.example/a: ") and message.isprintable() for message in messages)
    assert not any("not complete after" in message for message in messages)


def test_any_url_is_accepted_or_one_line_without_its_secrets():
    draw, parts = random.Random(0), ["http", "https", "://", ":", "/", "@", "?", "#", "[", "]", "SECRET", "a.b", "80"]
    parts += ["\\", "\n", " ", "%", "é", "::1", "..", "&", "x=y"]
    for _ in range(5000):
        url = draw.choice(["http://", "https://", ""]) + "".join(draw.choices(parts, k=draw.randrange(9)))
        shown = describe_url(url)
        assert shown.isprintable()
        if "SECRET" in shown:  # a host or a path, not a password or a query
            assert "@" not in url.partition("SECRET")[2] or not re.match(r"[^/]*:[^/]*SECRET", url.partition("://")[2])
            assert "?" not in url.partition("SECRET")[0]
        target = attempt(lambda: download._parse_url(url, shown))  # noqa: B023
        if isinstance(target, str):
            assert target.startswith(f"{shown}: ")
        else:
            assert target.scheme in ("http", "https")
            assert 1 <= target.port <= 65535
            assert (target.host + target.path).isascii()
            assert (target.host + target.path).isprintable()
            assert "@" not in target.host


@pytest.mark.skipif(sys.platform != "linux", reason="temporary files have a name elsewhere")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_remains_of_an_interrupted_download(internet, tmp_path, number):
    received = threading.Event()

    def respond(connection: socket.socket) -> None:
        connection.sendall(response(bytes(2**20)))
        received.set()
        time.sleep(20)

    internet.responses["/a"] = respond
    code = f"""
        import socket
        from vllama_jax.media import download
        from vllama_jax.runtime.interrupts import exit_on_interrupt
        download._dial = lambda *_: socket.create_connection(("127.0.0.1", {internet.port}))
        with exit_on_interrupt(until_exit=True), download.open_url("http://{PUBLIC}/a"):
            print("downloaded")
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        assert received.wait(60)
        time.sleep(0.2)
        process.send_signal(number)
        out, errors = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert (out, errors) == ("", "")
    assert list(tmp_path.iterdir()) == []
