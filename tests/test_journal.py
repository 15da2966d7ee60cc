"""JSON Lines files: incomplete lines of a killed process, truncation, and full disks."""

import errno
import json
import resource
import threading

import pytest

from vllama_jax.io.jsonl import JsonLinesFile


@pytest.fixture
def journal(tmp_path) -> JsonLinesFile:
    return JsonLinesFile(tmp_path / "lines.jsonl")


def test_lines_after_the_last_step_are_truncated(journal, tmp_path):
    lines = [{"step": step, "loss": step / 2} for step in (1, 2, 2, 3, 4)]
    journal.add(*lines)
    assert journal.truncate_after(2) == lines[:3]
    assert journal.read() == lines[:3]
    journal.add({"step": 3, "loss": 9})
    assert journal.truncate_after(3) == [*lines[:3], {"step": 3, "loss": 9}]
    assert journal.truncate_after(0) == []
    assert (tmp_path / "lines.jsonl").read_text() == ""


def test_an_incomplete_line_is_truncated_and_appending_continues(journal, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n[2]\n3\nnull\n{"step": \xff\n{"loss": 1}\n{"step": "2"}\n{"step": 2}\n{"step": 3}')
    assert journal.truncate_after(9) == [{"step": 1}, {"step": 2}], (
        "of a line without its end nobody knows whether it is whole"
    )
    journal.add({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_reading_keeps_objects_without_a_step(journal):
    journal.add({"id": "a"}, {"id": "b"})
    assert journal.read() == [{"id": "a"}, {"id": "b"}]


def test_a_file_with_nothing_to_truncate_is_not_rewritten(journal, tmp_path):
    assert journal.read() == []
    assert not (tmp_path / "lines.jsonl").exists()
    journal.add({"step": 1})
    before = (tmp_path / "lines.jsonl").stat().st_ino
    journal.truncate_after(1)
    assert (tmp_path / "lines.jsonl").stat().st_ino == before


def test_a_full_disk_leaves_no_partial_line(journal, tmp_path):
    journal.add({"step": 1})
    size = (tmp_path / "lines.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8, limits[1]))  # the next line has 12 bytes
    try:
        with pytest.raises(OSError, match=r"No space left|too large") as error:
            journal.add({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert (tmp_path / "lines.jsonl").stat().st_size == size
    journal.add({"step": 3})
    assert journal.read() == [{"step": 1}, {"step": 3}]


def test_threads_do_not_mix_their_lines(journal):
    long = "x" * 10_000

    def write(number: int) -> None:
        for step in range(20):
            journal.add({"thread": number, "step": step, "text": long})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = journal.read()
    assert sorted((line["thread"], line["step"]) for line in found) == [(n, s) for n in range(4) for s in range(20)]
    assert json.dumps(found[0]).endswith('x"}')
