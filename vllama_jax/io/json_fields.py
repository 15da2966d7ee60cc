"""Get and validate fields of JSON objects that users provide. Errors contain the file and the field."""

from collections.abc import Mapping
from typing import Any

from vllama_jax.errors import VllamaError

LARGEST_INTEGER = 2**24  # of any count, length or token id; larger values are invalid, and products would overflow
REQUIRED = object()


def get_integer(
    fields: Mapping[str, Any], name: str, where: str, error: type[VllamaError], default: Any = REQUIRED, low: int = 1
) -> Any:
    """Get an integer from a field.

    Args:
        fields: The JSON object.
        name: The field.
        where: File and object, for the message.
        error: The exception to raise.
        default: Value if the field is missing. By default the field is required.
        low: The minimum; the maximum is LARGEST_INTEGER.

    Returns:
        The integer.

    Raises:
        error: The field is missing, of another type (true and false are not numbers), or out of range.
    """
    if name not in fields and default is not REQUIRED:
        return default
    value = fields.get(name)
    if type(value) is not int or not low <= value <= LARGEST_INTEGER:
        raise error(f"{where}: {name} must be an integer from {low} to {LARGEST_INTEGER}, not {format_value(value)}")
    return value


def get_number(
    fields: Mapping[str, Any], name: str, where: str, error: type[VllamaError], high: float, default: Any = REQUIRED
) -> Any:
    """Get a number above 0 and at most `high` from a field, as a float; see `get_integer`."""
    if name not in fields and default is not REQUIRED:
        return default
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
        raise error(f"{where}: {name} must be a number above 0 and at most {high:g}, not {format_value(value)}")
    return float(value)


def get_bool(fields: Mapping[str, Any], name: str, where: str, error: type[VllamaError]) -> bool:
    """Get a boolean from a field, False if it is missing. Raise `error` for another type."""
    value = fields.get(name, False)
    if type(value) is not bool:
        raise error(f"{where}: {name} must be true or false, not {format_value(value)}")
    return value


def drop_null(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Drop those of the fields `names` that are null, for fields in which null means missing."""
    return {name: value for name, value in fields.items() if value is not None or name not in names}


def format_value(value: Any) -> str:
    """Format a value for a message, truncated to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
