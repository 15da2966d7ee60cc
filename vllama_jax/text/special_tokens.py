"""What the JSON files beside a tokenizer say about special tokens: which there are, and which start and end a text."""

import dataclasses
from pathlib import Path

from vllama_jax.errors import CheckpointError
from vllama_jax.io.json_fields import format_value, get_bool, get_integer
from vllama_jax.io.json_files import parse_object
from vllama_jax.io.paths import read_first_bytes

SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CONFIG_FILES = ("config.json", "generation_config.json")  # asked for special ids where only a tokenizer.json is there
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # the order in which transformers gives new tokens their ids


@dataclasses.dataclass
class SpecialTokenConfig:
    """What the JSON files beside a tokenizer say about special tokens."""

    roles: dict[str, str] = dataclasses.field(default_factory=dict)  # "bos" → "<s>"
    ids: dict[str, int] = dataclasses.field(default_factory=dict)  # of added tokens
    flags: dict[str, tuple[bool, bool]] = dataclasses.field(default_factory=dict)  # lstrip, rstrip
    hidden: set[str] = dataclasses.field(default_factory=set)
    add_bos: bool | None = None  # None where they do not say

    def declare(self, value: str | dict, flags_of_string: tuple[bool, bool]) -> str:
        """Notes a token's flags and returns its content; a token without flags of its own never overrides one with."""
        content = value if isinstance(value, str) else value["content"]
        if not isinstance(content, str) or not content:
            raise ValueError(f"{format_value(content)} is not a token")
        if isinstance(value, str):
            self.flags.setdefault(value, flags_of_string)
        else:
            self.flags[content] = (bool(value.get("lstrip")), bool(value.get("rstrip")))
        return content


def read_special_tokens(directory: Path) -> SpecialTokenConfig:
    """Special tokens as transformers 4.28 reads them, and `added_tokens_decoder`, which came later.

    special_tokens_map.json goes before tokenizer_config.json. White space beside a token is dropped where the token is
    a plain string, but not where it is a string of tokenizer_config.json alone: LlamaTokenizer wraps those.
    """
    config, special_map, added_tokens = (read_object_file(directory / name) for name in SPECIAL_TOKEN_FILES)
    declared = SpecialTokenConfig()
    if config.get("add_bos_token") is not None:
        declared.add_bos = get_bool(config, "add_bos_token", str(directory / SPECIAL_TOKEN_FILES[0]), CheckpointError)
    try:
        for role in ROLES:
            mapped = special_map.get(f"{role}_token")
            mapped = None if mapped == "" else mapped
            value = config.get(f"{role}_token") if mapped is None else mapped
            if value is not None and value != "":
                declared.roles[role] = declared.declare(value, (bool(mapped), bool(mapped)))
        for source in (special_map, config):
            for value in source.get("additional_special_tokens") or []:
                declared.hidden.add(declared.declare(value, (True, True)))
        added = str(directory / SPECIAL_TOKEN_FILES[2])
        for content in added_tokens:
            token_id = get_integer(added_tokens, content, added, CheckpointError, low=0)
            declared.ids[declared.declare(content, (True, True))] = token_id
        for key, value in (config.get("added_tokens_decoder") or {}).items():
            token_id = _id_of_key(key, directory / SPECIAL_TOKEN_FILES[0])
            declared.ids[declared.declare(value, (True, True))] = token_id
            if value.get("special"):
                declared.hidden.add(value["content"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"({type(error).__name__}: {error}): look into {', '.join(SPECIAL_TOKEN_FILES)}"
        raise CheckpointError(f"the special tokens in {directory} cannot be read {problem}") from error
    return declared


def read_config_token_ids(directory: Path) -> tuple[dict[str, int], list[int]]:
    """Special ids in the language model's configuration, the first where it lists several; and all that end answers."""
    ids: dict[str, int] = {}
    eos_ids: list[int] = []
    for name in CONFIG_FILES:
        fields = read_object_file(directory / name)
        for role in ("bos", "eos", "pad"):
            value = fields.get(f"{role}_token_id")
            values = value if isinstance(value, list) and value else [value]
            if values[0] in (None, -1) and values[0] is not True:  # how old configs say that there is none
                continue
            where = str(directory / name)
            found = [
                get_integer({f"{role}_token_id": one}, f"{role}_token_id", where, CheckpointError, low=0)
                for one in values
            ]
            ids[role] = found[0]
            eos_ids = found if role == "eos" else eos_ids
    return ids, eos_ids


def _id_of_key(key: str, path: Path) -> int:
    """The token id that a key of added_tokens_decoder is."""
    if not (key.isascii() and key.isdigit() and len(key) < 9):
        raise CheckpointError(f"{path}: added_tokens_decoder: {format_value(key)} is not a token id")
    return int(key)


def read_object_file(path: Path) -> dict:
    """A JSON file that holds an object; {} if there is no such file."""
    if not path.is_file():
        return {}
    return parse_object(read_bytes(path), str(path), CheckpointError)


def read_bytes(path: Path) -> bytes:
    read_first_bytes(path, CheckpointError)
    return path.read_bytes()
