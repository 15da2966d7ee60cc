"""Detect truncated media files by the sizes that their containers declare."""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

_TS_PACKETS = ((0, 188), (4, 192), (0, 204))  # (offset of the sync byte, size) of a transport stream's packets
_RELEASE_STEP = 2**25  # bytes; pages of a long file that were read count as memory until they are released
_RIFF_SLACK = 9  # bytes; some writers wrongly count the first 8, or omit the padding at the end
_BOX_NAMES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"}  # a QuickTime file may lack the ftyp

# Matroska element IDs (RFC 9559 §27) with their length marker.
_EBML, _SEGMENT, _INFO, _CLUSTER, _TIMESTAMP, _DURATION, _SCALE = (
    0x1A45DFA3,
    0x18538067,
    0x1549A966,
    0x1F43B675,
    0xE7,
    0x4489,
    0x2AD7B1,
)
_MATROSKA_LEVEL_1 = {_INFO, _CLUSTER, 0x114D9B74, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367}
_MP4_MEDIA = {"ftyp", "moov", "moof", "mdat"}  # boxes without which frames are missing

_ASF_HEADER, _ASF_DATA, _ASF_FILE = (
    bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"),
    bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c"),
    bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"),
)


class Truncation(NamedTuple):
    """How a file is truncated.

    Attributes:
        missing: "media" if the file is shorter than it declares, so that frames or samples are missing unless their
            number shows otherwise; "index" if only data after the media is missing; "packet" if no size is declared,
            but the file ends within a packet, or without an end marker, as a live recording may.
        evidence: The reason, for a message.
    """

    missing: Literal["media", "index", "packet"]
    evidence: str

    @property
    def note(self) -> str:
        """A remark for the report on a file that can be used."""
        certain = {"media": "is truncated after its last frame", "index": "is truncated after its media"}
        return f"the file {certain.get(self.missing, 'may be truncated')}: {self.evidence}"


def find_truncation(path: str) -> Truncation | None:
    """Compare the sizes that a file's container declares with the file's length.

    Args:
        path: The file.

    Returns:
        How the file is truncated; None for a complete file, one that declares no sizes (live recordings), and an
        unknown container.
    """
    status = Path(path).stat()
    return _find_truncation(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=16)
def _find_truncation(path: str, version: tuple[int, ...]) -> Truncation | None:
    """Check one version of a file. A check of a long file is slow, and reading a file asks for it several times."""
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for is_container, check in _CHECKS:
            if is_container(data[:16]):
                return check(data)
    return None


def has_mp4_index(path: str) -> bool:
    """Return whether an mp4 has a complete index (moov). Without it no frame can be read."""
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(name == "moov" and end <= len(data) for name, _, end in mp4_boxes(data))


def _compare_length(
    data: mmap.mmap, expected: int, missing: Literal["media", "index"] = "media", slack: int = 0
) -> Truncation | None:
    if expected - slack <= len(data):
        return None
    return Truncation(missing, f"{len(data):,} of {expected:,} bytes found")


def _ends_within(packet: str) -> Truncation:
    return Truncation("packet", f"the file ends within {packet}")


def mp4_boxes(data: mmap.mmap, start: int = 0, end: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and end of each box (ISO/IEC 14496-12 §4.2) from `start` on: by default at the top level."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        length = int.from_bytes(data[start : start + 4], "big")
        if length == 1:  # the length is a 64-bit number after the name
            length = int.from_bytes(data[start + 8 : start + 16], "big")
        elif length == 0:  # the box extends to the end of the file
            length = end - start
        if length < 8:
            return
        yield data[start + 4 : start + 8].decode("latin-1"), start, start + length
        start += length


def _mp4(data: mmap.mmap) -> Truncation | None:
    boxes = list(mp4_boxes(data))
    name, _, end = boxes[-1] if boxes else ("", 0, 0)
    if end == len(data) or not boxes:
        return None
    if end < len(data):  # a few bytes of a box's header, unless they are padding
        return _ends_within("a box's header") if any(data[end:]) and len(data) - end < 8 else None
    return _compare_length(data, end, "media" if name in _MP4_MEDIA else "index")


def _riff(data: mmap.mmap) -> Truncation | None:
    """Check AVI, WAV and WebP files. A file that was written to a pipe has sizes of 0 or 0xFFFFFFFF."""
    start = 0
    while data[start : start + 4] == b"RIFF":  # a long AVI has several
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        if size in (0, 0xFFFFFFFF):
            return None
        last, start = start, start + 8 + size + size % 2
    if data[8:12] == b"WAVE":
        return _riff_chunk(data, 0, b"data") or _compare_length(data, start, "index", _RIFF_SLACK)
    truncation = _compare_length(data, start, slack=_RIFF_SLACK)
    if truncation and data[8:12] == b"AVI " and not _riff_chunk(data, last, b"LIST"):
        return _compare_length(data, start, "index")  # the data after the list of frames
    return truncation


def _riff_chunk(data: mmap.mmap, riff: int, wanted: bytes) -> Truncation | None:
    """Check whether a RIFF's last chunk of one name is complete: a WAV's samples, an AVI's frames."""
    start, end = riff + 12, 0
    while start + 8 <= len(data):
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        if data[start : start + 4] == wanted:
            end = 0 if size == 0xFFFFFFFF else start + 8 + size
        start += 8 + size + size % 2
    return _compare_length(data, end)


def _rf64(data: mmap.mmap) -> Truncation | None:
    return _compare_length(data, 8 + int.from_bytes(data[20:28], "little"))


def _w64(data: mmap.mmap) -> Truncation | None:
    return _compare_length(data, int.from_bytes(data[16:24], "little"))


def _aiff(data: mmap.mmap) -> Truncation | None:
    return _compare_length(data, 8 + int.from_bytes(data[4:8], "big"))


def _au(data: mmap.mmap) -> Truncation | None:
    offset, size = struct.unpack(">II", data[4:12])
    return None if size == 0xFFFFFFFF else _compare_length(data, offset + size)


def _caf(data: mmap.mmap) -> Truncation | None:
    start = 8
    while start + 12 <= len(data):
        size = int.from_bytes(data[start + 4 : start + 12], "big", signed=True)
        if size < 0:  # to the end of the file
            return None
        start += 12 + size
    return _compare_length(data, start)


def _matroska(data: mmap.mmap) -> Truncation | None:
    """Check Matroska and WebM files. Live recordings have segments and clusters of unknown size."""
    segments = [(start, end) for name, start, end in _ebml_elements(data, 0, len(data)) if name == _SEGMENT]
    if not segments:
        return None
    start, end = segments[-1]
    seconds, scale, timestamp, last, last_end, released = 0.0, 10**6, 0, 0, start, start
    while last_end + 2 <= min(len(data), end or len(data)):
        if last_end - released > _RELEASE_STEP and hasattr(data, "madvise"):  # not on Windows
            data.madvise(mmap.MADV_DONTNEED)
            released = last_end
        last, content, stop = next(_ebml_elements(data, last_end, len(data)), (0, 0, 0))
        if last == _CLUSTER:
            last_end, timestamp = _read_cluster(data, content, stop)
            continue
        if stop is None:  # only segments and clusters may be of unknown size
            return None
        last_end = stop
        if not last:
            break
        if last == _INFO:
            elements = _ebml_elements(data, content, min(last_end, len(data)))
            info = {name: data[first : end or first] for name, first, end in elements}
            scale = int.from_bytes(info.get(_SCALE, b"\x0f\x42\x40")[:8], "big")
            seconds = _ebml_float(info.get(_DURATION, b"")) * scale / 1e9
    if end is not None:
        return _compare_length(data, end, "media" if last in (_CLUSTER, 0) else "index")
    if last_end > len(data) or 0 < len(data) - last_end < 12:
        return _ends_within("a block")
    recorded = timestamp * scale / 1e9
    if recorded and seconds - recorded > max(2, 0.05 * seconds):  # a cluster lasts seconds, and durations are rounded
        return Truncation("packet", f"{seconds:.1f} s are declared, but the file ends after {recorded:.1f} s")
    return None


def _read_cluster(data: mmap.mmap, start: int, end: int | None) -> tuple[int, int]:
    """Return the end of a cluster (of unknown size, if `end` is None), and the timestamp of its last block."""
    timestamp = last = 0
    position = start
    while position + 2 <= min(len(data), end or len(data)):
        name, content, after = next(_ebml_elements(data, position, len(data)), (0, 0, 0))
        if not after or name in _MATROSKA_LEVEL_1:
            break
        if name == _TIMESTAMP:
            last = timestamp = int.from_bytes(data[content:after], "big")
        elif name == 0xA3:  # a block's timestamp is relative to its cluster's
            last = timestamp + int.from_bytes(data[content + 1 : content + 3], "big", signed=True)
        elif end is not None:
            break  # only the timestamps of a cluster of known size are needed, and they come first
        position = after
    return (position if end is None else end), last


def _ebml_elements(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int | None]]:
    """Yield ID, start and end of the content of each element; the end is None if the size is unknown (RFC 8794)."""
    while start + 2 <= end:
        id_length = 9 - data[start].bit_length()
        size_at = start + id_length
        if id_length > 4 or size_at >= end:
            return
        size_length = 9 - data[size_at].bit_length()
        if size_length > 8:
            return
        content = size_at + size_length
        size = int.from_bytes(data[size_at:content], "big") & (1 << 7 * size_length) - 1
        unknown = size == (1 << 7 * size_length) - 1
        yield int.from_bytes(data[start:size_at], "big"), content, None if unknown else content + size
        if unknown:
            return
        start = content + size


def _ebml_float(value: bytes) -> float:
    return struct.unpack(">f" if len(value) == 4 else ">d", value)[0] if len(value) in (4, 8) else 0.0


def _flv(data: mmap.mmap) -> Truncation | None:
    key = data.find(b"\0\x08filesize\0", 0, 1 << 16)
    if key >= 0:
        size = struct.unpack(">d", data[key + 11 : key + 19])[0] if key + 19 <= len(data) else 0.0
        if size > len(data):
            return _compare_length(data, int(min(size, 2**62)))
    start = 13
    while start + 11 <= len(data):
        start += 15 + int.from_bytes(data[start + 1 : start + 4], "big")  # tag header, data and the tag's size again
    return None if start in (len(data), len(data) + 4) else _ends_within("a tag")


def _asf(data: mmap.mmap) -> Truncation | None:
    """Check WMV and WMA files: objects of a GUID and a 64-bit size. A broadcast (bit 0 of flags) declares no sizes."""
    properties = data.find(_ASF_FILE, 0, 1 << 16)
    if properties < 0 or properties + 92 > len(data) or data[properties + 88] & 1:
        return None
    start, name = 0, b""
    while start + 24 <= len(data):
        name, size = data[start : start + 16], int.from_bytes(data[start + 16 : start + 24], "little")
        if size < 24:
            return None
        start += size
    return _compare_length(data, start, "media" if name in (_ASF_HEADER, _ASF_DATA) else "index")


def _ogg(data: mmap.mmap) -> Truncation | None:
    """Check that the last page (RFC 3533 §6) is complete and is marked as the last."""
    page = data.rfind(b"OggS")
    if page < 0 or page + 27 > len(data):
        return _ends_within("a page")
    lengths = data[page + 27 : page + 27 + data[page + 26]]
    if len(lengths) < data[page + 26] or page + 27 + len(lengths) + sum(lengths) > len(data):
        return _ends_within("a page")
    return None if data[page + 5] & 4 else Truncation("packet", "no page is marked as the last one")


def _transport_stream(data: mmap.mmap) -> Truncation | None:
    for offset, size in _TS_PACKETS:
        if len(data) > 4 * size and all(data[offset + number * size] == 0x47 for number in range(4)):
            return _ends_within("a packet") if len(data) % size else None
    return None


def _ivf(data: mmap.mmap) -> Truncation | None:
    declared, start, frames = int.from_bytes(data[24:28], "little"), 32, 0
    while start + 12 <= len(data):
        start += 12 + int.from_bytes(data[start : start + 4], "little")
        frames += start <= len(data)
    if frames < declared and start != len(data):
        return Truncation("media", f"{frames} of {declared} frames found")
    return _ends_within("a frame") if start > len(data) else None


def _gif(data: mmap.mmap) -> Truncation | None:
    """Check that blocks follow each other up to the trailer (GIF89a, appendix A)."""
    start = 13 + (_gif_colors(data[10]) if len(data) > 10 else 0)
    while start + 10 <= len(data) and data[start] in (0x21, 0x2C):
        start += 2 if data[start] == 0x21 else 11 + _gif_colors(data[start + 9])
        while start < len(data) and data[start]:
            start += 1 + data[start]
        start += 1
    return _ends_within("a frame") if start >= len(data) or data[start] in (0x21, 0x2C) else None


def _gif_colors(flags: int) -> int:
    """Return the size of the color table that follows the flags of a screen or an image, in bytes."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _png(data: mmap.mmap) -> Truncation | None:
    start = 8
    while start + 8 <= len(data):
        if data[start + 4 : start + 8] == b"IEND":
            return None
        start += 12 + int.from_bytes(data[start : start + 4], "big")
    return Truncation("media", "the file ends before its last chunk (IEND)")


def _mp3(data: mmap.mmap) -> Truncation | None:
    """Check the file size that the Xing (or Info) header of the first frame declares, counted from that frame."""
    start = 0
    while data[start : start + 3] == b"ID3" and start + 10 <= len(data):
        length = 0
        for byte in data[start + 6 : start + 10]:
            length = length << 7 | byte & 127
        start += 10 + length
    header = max(data.find(b"Xing", start, start + 192), data.find(b"Info", start, start + 192))
    if header < 0 or header + 16 > len(data):
        return None
    flags = int.from_bytes(data[header + 4 : header + 8], "big")
    if not flags & 2:
        return None
    at = header + 8 + 4 * (flags & 1)
    return _compare_length(data, start + int.from_bytes(data[at : at + 4], "big"))


_CHECKS = (
    (lambda head: head[4:8] in _BOX_NAMES, _mp4),
    (lambda head: head[:4] == b"RIFF", _riff),
    (lambda head: head[:4] == b"RF64", _rf64),
    (lambda head: head[:4] == b"riff", _w64),
    (lambda head: head[:4] == _EBML.to_bytes(4, "big"), _matroska),
    (lambda head: head[:4] == b"FLV\x01", _flv),
    (lambda head: head[:16] == _ASF_HEADER, _asf),
    (lambda head: head[:4] == b"OggS", _ogg),
    (lambda head: head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"), _aiff),
    (lambda head: head[:4] == b".snd", _au),
    (lambda head: head[:4] == b"caff", _caf),
    (lambda head: head[:4] == b"DKIF", _ivf),
    (lambda head: head[:6] in (b"GIF87a", b"GIF89a"), _gif),
    (lambda head: head[:8] == b"\x89PNG\r\n\x1a\n", _png),
    (lambda head: head[:3] == b"ID3" or head[:2] in (b"\xff\xfb", b"\xff\xfa", b"\xff\xf3"), _mp3),
    (lambda head: True, _transport_stream),
)
