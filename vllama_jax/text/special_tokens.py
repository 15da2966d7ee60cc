"""Read the JSON files of a tokenizer that declare special tokens, and those that start and end a text."""

import dataclasses
from pathlib import Path

from vllama_jax.errors import CheckpointError
from vllama_jax.io.json_fields import format_value, get_bool, get_integer
from vllama_jax.io.json_files import parse_object
from vllama_jax.io.paths import read_first_bytes

SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CONFIG_FILES = ("config.json", "generation_config.json")  # sources of special ids if there is only a tokenizer.json
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # the order in which transformers gives new tokens their ids


@dataclasses.dataclass
class SpecialTokenConfig:
    """The special tokens that the JSON files of a tokenizer declare.

    Attributes:
        roles: The token of each role: "bos" → "<s>".
        ids: The ids of added tokens.
        flags: (lstrip, rstrip) of each token.
        hidden: Tokens that `decode(skip_special=True)` omits.
        add_bos: Whether prompts start with a BOS; None if the files do not say.
    """

    roles: dict[str, str] = dataclasses.field(default_factory=dict)
    ids: dict[str, int] = dataclasses.field(default_factory=dict)
    flags: dict[str, tuple[bool, bool]] = dataclasses.field(default_factory=dict)
    hidden: set[str] = dataclasses.field(default_factory=set)
    add_bos: bool | None = None

    def declare(self, value: str | dict, flags_of_string: tuple[bool, bool]) -> str:
        """Record the flags of a token, and return its content.

        Args:
            value: The token. A plain string does not override the flags of an object with the same content.
            flags_of_string: (lstrip, rstrip) of a plain string.
        """
        content = value if isinstance(value, str) else value["content"]
        if not isinstance(content, str) or not content:
            raise ValueError(f"{format_value(content)} is not a token")
        if isinstance(value, str):
            self.flags.setdefault(value, flags_of_string)
        else:
            self.flags[content] = (bool(value.get("lstrip")), bool(value.get("rstrip")))
        return content


def read_special_tokens(directory: Path) -> SpecialTokenConfig:
    """Read special tokens as transformers 4.28 does, and also `added_tokens_decoder`, which is newer.

    special_tokens_map.json overrides tokenizer_config.json. White space around a token is stripped if the token is a
    plain string, unless only tokenizer_config.json has it: LlamaTokenizer wraps those strings.

    Args:
        directory: The folder of the tokenizer. Missing files declare nothing.

    Raises:
        CheckpointError: A file cannot be read or is invalid.
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
        problem = f"({type(error).__name__}: {error}): check {', '.join(SPECIAL_TOKEN_FILES)}"
        raise CheckpointError(f"the special tokens in {directory} cannot be read {problem}") from error
    return declared


def read_config_token_ids(directory: Path) -> tuple[dict[str, int], list[int]]:
    """Read special token ids from the language model's config.json and generation_config.json.

    Args:
        directory: The folder of the language model. Missing files declare nothing.

    Returns:
        The id of each role (the first one if a file lists several), and all ids that end an answer.

    Raises:
        CheckpointError: A file cannot be read, or an id is not a whole number.
    """
    ids: dict[str, int] = {}
    eos_ids: list[int] = []
    for name in CONFIG_FILES:
        fields = read_object_file(directory / name)
        for role in ("bos", "eos", "pad"):
            value = fields.get(f"{role}_token_id")
            values = value if isinstance(value, list) and value else [value]
            if values[0] in (None, -1) and values[0] is not True:  # old configs use -1 for none
                continue
            where = str(directory / name)
            token_ids = [
                get_integer({f"{role}_token_id": token_id}, f"{role}_token_id", where, CheckpointError, low=0)
                for token_id in values
            ]
            ids[role] = token_ids[0]
            eos_ids = token_ids if role == "eos" else eos_ids
    return ids, eos_ids


def _id_of_key(key: str, path: Path) -> int:
    """Convert a key of added_tokens_decoder to a token id."""
    if not (key.isascii() and key.isdigit() and len(key) < 9):
        raise CheckpointError(f"{path}: added_tokens_decoder: {format_value(key)} is not a token id")
    return int(key)


def read_object_file(path: Path) -> dict:
    """Read a JSON object from a file. Returns {} if there is no such file."""
    if not path.is_file():
        return {}
    return parse_object(read_bytes(path), str(path), CheckpointError)


def read_bytes(path: Path) -> bytes:
    """Read a file. Raises CheckpointError if there is no readable file with content."""
    read_first_bytes(path, CheckpointError)
    return path.read_bytes()
