"""JSON from outside: each fault is one error of the caller's class that names the file."""

import pytest

from vllama_jax.errors import CheckpointError, DataError
from vllama_jax.io.json_files import parse_json, parse_object, read_json, read_object

FAULTS = {
    "syntax": ("{", "not JSON"),
    "an integer of 5,000 digits": ('{"a": ' + "9" * 5000 + "}", "not JSON"),
    "a number beyond float": ('{"a": 1e400}', "1e400 is too large for a float"),
    "NaN": ('{"a": NaN}', "NaN is not a JSON number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is not a JSON number"),
    "nesting of 100,000": ('{"a": ' * 10**5, "nested too deeply"),
    "nested lists": ("[" * 10**5, "nested too deeply"),
}


@pytest.mark.parametrize(("text", "message"), FAULTS.values(), ids=FAULTS)
def test_an_invalid_document_raises_the_callers_error_with_location_and_advice(text, message):
    with pytest.raises(DataError, match=f"^file, line 3: .*{message}.*; write it again$") as caught:
        parse_json(text, "file, line 3", DataError, "write it again")
    assert "\n" not in str(caught.value)


def test_documents_of_any_type_parse_and_objects_are_required_where_asked():
    assert parse_json(b'[1, 2.5, "a", null]', "x", DataError) == [1, 2.5, "a", None]
    assert parse_object('{"a": {"b": -0.0}}', "x", DataError) == {"a": {"b": 0.0}}
    with pytest.raises(DataError, match=r"^x: must contain a JSON object, not list$"):
        parse_object("[]", "x", DataError)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None], ids=["no text", "no file"])
def test_an_unreadable_file_is_reported(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json: cannot be read \(.*; copy it again$"):
        read_json(path, advice="copy it again")
