"""The options of the server: addresses, keys, where media may come from, and limits."""

import dataclasses
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path

from vllama_jax.errors import ConfigError
from vllama_jax.text.templates import TemplateName

KEY_VARIABLE = "VLLAMA_API_KEY"
MEBIBYTE = 2**20
MIN_DECODE_MEGABYTES = 64  # for a small clip; with 16, OpenBLAS fails
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of the server.

    Attributes:
        host: The address to listen on. Other machines can connect to any but the default.
        port: The port; 0 for a free one, which is printed.
        name: The name of the model in the API; by default that of its directory.
        api_key_file: A file with API keys, one per line. Keys may also be in the environment variable VLLAMA_API_KEY.
            Without keys, everyone who can connect is answered.
        allow_domains: Host names from which https URLs are downloaded; by default none.
        allow_files: A directory whose files `file:` URLs may name; by default none.
        allow_origins: Origins of web pages that may call the API (CORS), such as https://example.org; by default none.
        allow_hosts: Host names by which clients address the server, besides localhost. Needed only behind a proxy that
            forwards the name while the server listens on a loopback address.
        template: The prompt template; by default the model's.
        int8_cache: Store keys and values in int8, which halves their memory and changes answers slightly.
        rows: The number of answers that are decoded at a time.
        max_waiting: The number of answers that may wait for a row. Further requests get status 429.
        prompt_tokens: The longest prompt, in tokens, media included. Its memory is reserved for each row.
        new_tokens: The longest answer, in tokens. Its memory is reserved for each row.
        max_frames: The largest number of video frames and images of a request.
        max_total_frames: The largest number of video frames and images of all requests while they are read.
        max_total_tokens: The largest number of prompt and answer tokens of all requests.
        max_body_megabytes: The largest request, in MiB. Media in base64 are part of it.
        max_total_megabytes: The largest size of all requests until they are answered, in MiB.
        max_file_megabytes: The largest file that is uploaded or downloaded, in MiB.
        max_files_megabytes: The largest size of all uploaded files, in MiB.
        file_hours: Uploaded files are removed after this time.
        decoders: The number of processes that decode media.
        decode_seconds: The time limit for a media file.
        decode_megabytes: The memory limit for a media file, in MiB (on Linux).
        cache_megabytes: The memory for encoded media that later requests may use again, in MiB.
        shutdown_seconds: For how long running answers are continued when the server is stopped.

    Raises:
        ConfigError: A value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key_file: Path | None = None
    allow_domains: tuple[str, ...] = ()
    allow_files: Path | None = None
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    template: TemplateName | None = None
    int8_cache: bool = False
    rows: int = 8
    max_waiting: int = 64
    prompt_tokens: int = 1024
    new_tokens: int = 512
    max_frames: int = 128
    max_total_frames: int = 1024
    max_total_tokens: int = 131072
    max_body_megabytes: int = 64
    max_total_megabytes: int = 1024
    max_file_megabytes: int = 2048
    max_files_megabytes: int = 16384
    file_hours: float = 24.0
    decoders: int = min(4, os.cpu_count() or 1)
    decode_seconds: float = 60.0
    decode_megabytes: int = 2048
    cache_megabytes: int = 256
    shutdown_seconds: float = 60.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), 0 if field.name in ("port", "max_waiting", "cache_megabytes") else 1
            if field.type is int and value < low:
                raise ConfigError(f"{field.name} must be at least {low}, not {value}")
            if field.type is float and not value > 0:
                raise ConfigError(f"{field.name} must be above 0, not {value}")
        if self.decode_megabytes < MIN_DECODE_MEGABYTES:
            least = MIN_DECODE_MEGABYTES
            raise ConfigError(f"decode_megabytes must be at least {least}, not {self.decode_megabytes}")
        if self.port > 65535:
            raise ConfigError(f"port must be at most 65535, not {self.port}")
        for name in ("allow_domains", "allow_origins", "allow_hosts"):
            object.__setattr__(self, name, tuple(_split(getattr(self, name))))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def max_request_tokens(self) -> int:
        """The largest number of tokens of a prompt and its answer."""
        return self.prompt_tokens + self.new_tokens


def _split(values: Iterable[str]) -> Iterable[str]:
    """Yield names that are separated by spaces or commas, in lowercase."""
    for value in values:
        yield from (name.strip().lower() for name in value.split(",") if name.strip())


def read_keys(file: Path | None) -> tuple[str, ...]:
    """Return the API keys of a file and of the environment.

    Args:
        file: A file with one key per line; None for none. Empty lines and lines that begin with "#" are ignored.

    Raises:
        ConfigError: The file cannot be read or has no key, or a key has a space or a character that is not ASCII.
    """
    keys = [key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(",") if key.strip()]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(
                f"{file}: the API keys cannot be read ({why}); give a file with one key per line"
            ) from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ConfigError(f"{file}: has no API key; write one key per line")
        keys += found
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ConfigError(
            "an API key has a space or a character that is not ASCII; use letters, digits and punctuation"
        )
    return tuple(keys)
