"""Read the sample tables of an mp4: every packet of a stream is known without reading the media data."""

from __future__ import annotations

import itertools
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllama_jax.media.files import demux, open_container
from vllama_jax.media.truncation import mp4_boxes

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.stream import Stream
    from jaxtyping import Bool, Int64

_NUM_COMPARED = 64  # packets at the start; an edit list removes frames there
_MAX_STEP = 10.0  # s; a longer gap in an mp4 may be a reset of the clock (`clock.Clock`)


class SampleTable(NamedTuple):
    """The packets of a stream in decoding order. Timestamps are in units of the stream's time base.

    Attributes:
        pts: Presentation timestamps.
        dts: Decoding timestamps.
        size: In bytes.
        duration: In units of the time base.
        is_key: Whether each is marked as a key frame.
        is_discarded: Whether each is decoded but not shown (edit lists).
    """

    pts: Int64[np.ndarray, "n"]
    dts: Int64[np.ndarray, "n"]
    size: Int64[np.ndarray, "n"]
    duration: Int64[np.ndarray, "n"]
    is_key: Bool[np.ndarray, "n"]
    is_discarded: Bool[np.ndarray, "n"]


def read_sample_table(path: str, stream_index: int) -> SampleTable | None:
    """Read the packets of a stream from an mp4's index. The first and the last are compared with what FFmpeg reads.

    Args:
        path: The file.
        stream_index: The index of the stream in FFmpeg's container.

    Returns:
        The packets; None if the file is not an mp4, or its index does not list every packet as FFmpeg reads it: a
        fragmented mp4, several edits, or timestamps that descend or have long gaps.
    """
    with open_container(path) as container:
        if not container.format.name.startswith("mov"):
            return None
        with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_checked(container, container.streams[stream_index], data)


def _read_checked(container: InputContainer, stream: Stream, data: mmap.mmap) -> SampleTable | None:
    try:
        table = _read_track(data, stream.id)
    except (struct.error, KeyError, IndexError, ValueError):  # FFmpeg may read it nevertheless
        return None
    if table is None or stream.time_base is None:
        return None
    first = _read_rows(container, stream, min(len(table.dts), _NUM_COMPARED))
    if not first or first[0][0] is None or first[0][1] is None:
        return None
    table = table._replace(pts=table.pts - table.pts[0] + first[0][0], dts=table.dts - table.dts[0] + first[0][1])
    steps = np.diff(table.dts) * float(stream.time_base)
    if steps.min(initial=0) < 0 or steps.max(initial=0) > _MAX_STEP or table.is_discarded[_NUM_COMPARED:].any():
        return None
    container.seek(int(table.dts[-1]), stream=stream, any_frame=True)
    last = _read_rows(container, stream, len(table.dts))
    is_same = first == _rows(table, slice(len(first))) and last == _rows(table, slice(-len(last), None))
    return table if is_same else None


def _read_rows(container: InputContainer, stream: Stream, count: int) -> list[tuple[int | None, ...]]:
    """Return the metadata of the next packets, in the order of `SampleTable`, from the position of the container."""
    packets = itertools.islice((packet for packet in demux(container, stream) if packet.size), count)
    return [(p.pts, p.dts, p.size, p.duration or 0, p.is_keyframe, p.is_discard) for p in packets]


def _rows(table: SampleTable, part: slice) -> list[tuple[int, ...]]:
    return list(zip(*(column[part].tolist() for column in table), strict=True))


def _read_track(data: mmap.mmap, track_id: int) -> SampleTable | None:
    """Read the tables of one track (ISO/IEC 14496-12 §8); None if it is not there or has several edits.

    Raises:
        struct.error, KeyError, IndexError, ValueError: A box is missing or too short.
    """
    moov = dict(_boxes(data, 0, len(data)))["moov"]
    for name, span in _boxes(data, *moov):
        if name != "trak":
            continue
        track = dict(_boxes(data, *span))
        header = track["tkhd"][0]
        if int.from_bytes(data[header + 12 + 8 * data[header] :][:4], "big") != track_id:
            continue
        media = dict(_boxes(data, *dict(_boxes(data, *track["mdia"]))["minf"]))
        edits = _read_edits(data, dict(_boxes(data, *track["edts"]))["elst"]) if "edts" in track else []
        starts = [media_time for media_time in edits if media_time >= 0]  # -1 is a pause before the media
        if len(starts) > 1:
            return None
        return _read_samples(data, dict(_boxes(data, *media["stbl"])), starts[0] if starts else 0)
    return None


def _read_samples(data: mmap.mmap, boxes: dict[str, tuple[int, int]], start: int) -> SampleTable:
    """Read the sample tables of a track whose presentation begins at `start`, in units of the track's time scale."""
    fixed, count = struct.unpack_from(">II", data, boxes["stsz"][0] + 4)
    size = np.full(count, fixed) if fixed else _read_numbers(data, boxes["stsz"], 8, columns=1)[:, 0]
    duration = _read_runs(data, boxes["stts"])
    offset = _read_runs(data, boxes["ctts"]) if "ctts" in boxes else np.zeros(count, np.int64)
    if not count or not len(size) == len(duration) == len(offset) == count:
        raise ValueError("the tables have different lengths")
    is_key = np.ones(count, bool)
    if "stss" in boxes:
        is_key[:] = False
        is_key[_read_numbers(data, boxes["stss"], 4, columns=1)[:, 0] - 1] = True
    dts = np.cumsum(duration) - duration
    return SampleTable(dts + offset, dts, size, duration, is_key, dts + offset < start)


def _read_runs(data: mmap.mmap, span: tuple[int, int]) -> Int64[np.ndarray, "n"]:
    """Return the values of a table of (count, value), one value for each sample."""
    counts, values = _read_numbers(data, span, 4, columns=2).T
    if counts.min(initial=0) < 0 or counts.sum() > len(data):  # a sample has at least a byte
        raise ValueError("implausible counts")
    return np.repeat(values, counts)


def _read_numbers(data: mmap.mmap, span: tuple[int, int], offset: int, columns: int) -> Int64[np.ndarray, "n columns"]:
    """Return a table of signed 32-bit numbers. Its number of rows is at `offset` of the box, followed by the rows."""
    start = span[0] + offset + 4
    (count,) = struct.unpack_from(">I", data, start - 4)
    end = start + 4 * columns * count
    if end > span[1]:
        raise ValueError("the table is longer than its box")
    return np.frombuffer(data[start:end], ">i4").astype(np.int64).reshape(count, columns)


def _read_edits(data: mmap.mmap, span: tuple[int, int]) -> list[int]:
    """Return the start of each edit, in units of the track's time scale; -1 for a pause."""
    version, (count,) = data[span[0]], struct.unpack_from(">I", data, span[0] + 4)
    row = struct.Struct(">QqI" if version else ">IiI")
    if span[0] + 8 + count * row.size > span[1]:
        raise ValueError("the edit list is longer than its box")
    return [row.unpack_from(data, span[0] + 8 + number * row.size)[1] for number in range(count)]


def _boxes(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the name of each box in a range, and the start and end of its content."""
    for name, box_start, box_end in mp4_boxes(data, start, end):
        header = 16 if data[box_start : box_start + 4] == b"\0\0\0\1" else 8
        yield name, (box_start + header, min(box_end, end))
