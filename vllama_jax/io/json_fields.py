"""Fields of JSON objects from outside: of the right type and in range, or one error that names file and field."""

from collections.abc import Mapping
from typing import Any

from vllama_jax.errors import VllamaError

LARGEST_INTEGER = 2**24  # of any count, length or token id; beyond it a file is wrong, and products overflow
REQUIRED = object()


def get_integer(
    fields: Mapping[str, Any], name: str, where: str, error: type[VllamaError], default: Any = REQUIRED, low: int = 1
) -> Any:
    """The whole number from `low` to LARGEST_INTEGER in a field; `default`, where one is given and it is not there.

    Raises:
        error: The field is missing, of another type (true and false are no numbers), or out of range.
    """
    if name not in fields and default is not REQUIRED:
        return default
    value = fields.get(name)
    if type(value) is not int or not low <= value <= LARGEST_INTEGER:
        raise error(
            f"{where}: {name} must be a whole number from {low} to {LARGEST_INTEGER}, not {format_value(value)}"
        )
    return value


def get_number(
    fields: Mapping[str, Any], name: str, where: str, error: type[VllamaError], high: float, default: Any = REQUIRED
) -> Any:
    """The number above 0 and at most `high` in a field, as a float; see `whole_number`."""
    if name not in fields and default is not REQUIRED:
        return default
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
        raise error(f"{where}: {name} must be a number above 0 and at most {high:g}, not {format_value(value)}")
    return float(value)


def get_bool(fields: Mapping[str, Any], name: str, where: str, error: type[VllamaError]) -> bool:
    """The truth value in a field, false where there is none. Raises `error` for another type."""
    value = fields.get(name, False)
    if type(value) is not bool:
        raise error(f"{where}: {name} must be true or false, not {format_value(value)}")
    return value


def drop_null(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The fields without those of `names` that are null: where null means that nothing is said."""
    return {name: value for name, value in fields.items() if value is not None or name not in names}


def format_value(value: Any) -> str:
    """A value for a message, at most 40 characters of it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
