"""Load the tokenizer of a LLaMA-family model from a folder; convert text to token ids and back.

With `tokenizer.model`, SentencePiece tokenizes and this module splits at special tokens. Ids and text then equal the
reference's, which is the slow LlamaTokenizer of transformers 4.28 that the released weights were trained with. With
only `tokenizer.json` (Llama 3 and newer), the `tokenizers` library tokenizes.
"""

import abc
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllama_jax.errors import CheckpointError, format_error
from vllama_jax.io.json_fields import LARGEST_INTEGER, format_value, get_integer
from vllama_jax.io.json_files import parse_object
from vllama_jax.text.special_tokens import (
    CONFIG_FILES,
    ROLES,
    SPECIAL_TOKEN_FILES,
    SpecialTokenConfig,
    read_bytes,
    read_config_token_ids,
    read_special_tokens,
)

MEDIA_TOKEN = "<ImageHere>"
REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True)
class SpecialToken:
    """A token that is found in a text before the text is tokenized.

    Attributes:
        content: Its text.
        id: Its id.
        lstrip: Whether white space before it is removed.
        rstrip: Whether white space after it is removed.
        hidden: Whether `decode(skip_special=True)` omits it.
    """

    content: str
    id: int
    lstrip: bool
    rstrip: bool
    hidden: bool = True


class Tokenizer(abc.ABC):
    """Converts text to token ids and back.

    Attributes:
        bos_id: The token that starts a prompt; None if a prompt starts with its first text (Qwen).
        eos_id: The EOS.
        eos_ids: All tokens that end an answer; the EOS is the first.
        unk_id: The unknown token; None if there is none (Llama 3).
        pad_id: The padding token; without one, the unknown token, as in the reference, or else the EOS.
        vocab_size: Number of tokens, including added ones but not the media placeholder.
        media_id: The reference's id of `<ImageHere>`: the first id after the vocabulary.
        directory: The folder that `load_tokenizer` read; None for other tokenizers.
    """

    directory: Path | None = None

    def __init__(
        self,
        special_tokens: Iterable[SpecialToken],
        role_ids: Mapping[str, int],
        base_vocab_size: int,
        *,
        starts_with_bos: bool = True,
        extra_eos_ids: Iterable[int] = (),
    ):
        """Set the attributes of all tokenizers.

        Args:
            special_tokens: All special tokens.
            role_ids: The ids of "bos", "eos", "unk" and other roles.
            base_vocab_size: Number of ids that the tokenization library knows; ids of special tokens may be larger.
            starts_with_bos: Whether prompts start with the BOS.
            extra_eos_ids: Ids that end an answer, in addition to the EOS.
        """
        special_tokens = tuple(special_tokens)
        self.vocab_size = max([base_vocab_size, *(token.id + 1 for token in special_tokens)])
        self.media_id = self.vocab_size
        self.bos_id = role_ids.get("bos") if starts_with_bos else None
        self.eos_id, self.unk_id = role_ids["eos"], role_ids.get("unk")
        self.eos_ids = tuple(dict.fromkeys([self.eos_id, *extra_eos_ids]))
        self.pad_id = role_ids.get("pad", role_ids.get("unk", self.eos_id))
        media = SpecialToken(MEDIA_TOKEN, self.media_id, lstrip=True, rstrip=True)
        self._by_content = {token.content: token for token in (*special_tokens, media)}
        self._by_id = {token.id: token for token in self._by_content.values()}
        self._hidden_ids = {token.id for token in self._by_content.values() if token.hidden}
        self._base_vocab_size = base_vocab_size
        longest_first = sorted(self._by_content, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @property
    def bos_ids(self) -> list[int]:
        """A list with the BOS, or an empty list."""
        return [] if self.bos_id is None else [self.bos_id]

    def encode(self, text: str, bos: bool = False, special: bool = True) -> list[int]:
        """Tokenize a text.

        Args:
            text: Any text. Lone surrogates (invalid bytes on a command line) become "?".
            bos: Whether to start with `bos_ids`.
            special: Whether to parse special tokens such as `</s>` and `<ImageHere>`; if not, they are plain text.

        Returns:
            The token ids.
        """
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = self.bos_ids if bos else []
        if not special:
            return ids + self._encode_plain(text)
        for segment in self._split(text):
            token = self._by_content.get(segment)
            ids.extend([token.id] if token else self._encode_plain(segment))
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Convert token ids to text, without clean-up of spaces.

        As in transformers 4.28, tokens beyond the library's vocabulary, such as the media placeholder, are separated by
        spaces. Ids beyond the vocabulary, which a padded embedding table may have, become no text.

        Args:
            ids: Token ids.
            skip_special: Whether to omit hidden special tokens.
        """
        texts = []
        ids = self._drop_ids_without_text(ids, skip_special)
        for is_base, group in itertools.groupby(ids, key=lambda i: i < self._base_vocab_size):
            group_ids = list(group)
            texts += [self._decode_base(group_ids)] if is_base else self.tokens(group_ids)
        return " ".join(texts)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the token of each id, such as "▁dog"; "" for an id beyond the vocabulary."""
        return [self._by_id[i].content if i in self._by_id else self._base_token(i) for i in map(int, ids)]

    def special_token_id(self, content: str) -> int | None:
        """Return the id of a special token, given its text; None if there is no such token."""
        token = self._by_content.get(content)
        return None if token is None or content == MEDIA_TOKEN else token.id

    def decode_stable_prefix(self, ids: Iterable[int]) -> str:
        """Decode the prefix of `decode(ids, skip_special=True)` that further ids cannot change.

        A suffix that may become another character when its remaining bytes arrive is omitted.
        """
        kept = self._drop_ids_without_text(ids, skip_special=True)
        return self.decode(kept[: len(kept) - self._count_unstable(kept)]).rstrip(REPLACEMENT)

    @abc.abstractmethod
    def _encode_plain(self, text: str) -> list[int]:
        """Tokenize a text without special tokens."""

    @abc.abstractmethod
    def _decode_base(self, ids: list[int]) -> str:
        """Decode ids that the library knows."""

    @abc.abstractmethod
    def _base_token(self, token_id: int) -> str:
        """Return the token of an id; "" if the library does not know it."""

    def _count_unstable(self, ids: list[int]) -> int:
        """Count the ids at the end whose text may still change when further ids follow."""
        return 0

    def _drop_ids_without_text(self, ids: Iterable[int], skip_special: bool) -> list[int]:
        hidden = self._hidden_ids if skip_special else ()
        return [i for i in map(int, ids) if (i < self._base_vocab_size or i in self._by_id) and i not in hidden]

    def _split(self, text: str) -> list[str]:
        """Split a text at special tokens, and strip white space where their flags say so. Drops empty texts."""
        segments = self._special.split(text)
        for i in range(1, len(segments), 2):  # special tokens are at odd indices
            token = self._by_content[segments[i]]
            if token.lstrip:
                segments[i - 1] = segments[i - 1].rstrip()
            if token.rstrip:
                segments[i + 1] = segments[i + 1].lstrip()
        return [segment for segment in segments if segment]


class SentencePieceTokenizer(Tokenizer):
    """The tokenizer of a `tokenizer.model`. SentencePiece adds "▁" before each text between special tokens."""

    def __init__(
        self, processor: Any, special_tokens: Iterable[SpecialToken], role_ids: Mapping[str, int], starts_with_bos: bool
    ):
        super().__init__(special_tokens, role_ids, processor.get_piece_size(), starts_with_bos=starts_with_bos)
        self._processor = processor

    def _encode_plain(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _decode_base(self, ids: list[int]) -> str:
        """Decode ids, with the content of special tokens.

        The reference adds a space before the *text* that precedes a special token, not before the token: "a</s>b"
        becomes " a</s>b".
        """
        text, run, after_special = "", [], False
        for i, token_id in enumerate(ids):
            if token_id not in self._hidden_ids:
                run.append(token_id)
                after_special = False
                continue
            space = " " if i > 0 and not after_special else ""
            text += space + self._processor.decode(run) + self._by_id[token_id].content
            run, after_special = [], True
        return text + self._processor.decode(run)

    def _base_token(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id) if token_id < self._base_vocab_size else ""


class JsonTokenizer(Tokenizer):
    """The tokenizer of a `tokenizer.json`, which uses the `tokenizers` library."""

    def __init__(
        self, library: Any, special_tokens: Iterable[SpecialToken], role_ids: Mapping[str, int], **options: Any
    ):
        """Set the attributes, and configure the library.

        Args:
            library: A `tokenizers.Tokenizer`, which is changed.
            special_tokens: All special tokens.
            role_ids: The ids of "bos", "eos", "unk" and other roles.
            **options: Keyword arguments of `Tokenizer`.
        """
        added = library.get_added_tokens_decoder()
        ids = library.get_vocab(with_added_tokens=True).values()
        super().__init__(special_tokens, role_ids, max([-1, *ids, *added]) + 1, **options)
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # the library gets plain text only
        self._library = library

    def _encode_plain(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def _decode_base(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)

    def _base_token(self, token_id: int) -> str:
        return self._library.id_to_token(token_id) or ""

    def _count_unstable(self, ids: list[int]) -> int:
        """Count byte tokens at the end. The library decodes all of them as replacement characters if one is invalid."""
        tokens = map(self._base_token, reversed(ids))
        return sum(1 for _ in itertools.takewhile(re.compile("<0x[0-9A-F]{2}>").fullmatch, tokens))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Load the tokenizer in a folder: `tokenizer.model` if it exists, else `tokenizer.json`.

    Args:
        directory: The folder of the language model.

    Raises:
        CheckpointError: There is no tokenizer, or one of its files cannot be read.
    """
    directory = Path(directory)
    if (directory / "tokenizer.model").is_file():
        tokenizer: Tokenizer = _load_sentencepiece(directory)
    elif (directory / "tokenizer.json").is_file():
        tokenizer = _load_json(directory)
    else:
        raise CheckpointError(
            f"no tokenizer in {directory}: looked for tokenizer.model and tokenizer.json; "
            "copy one of them there from the folder of the language model"
        )
    tokenizer.directory = directory.absolute()
    return tokenizer


def tokenizer_files(directory: str | Path) -> list[Path]:
    """Return the files to copy so that `load_tokenizer` loads the same tokenizer from the copy.

    Args:
        directory: The folder of the tokenizer.
    """
    names = ["tokenizer.model", "tokenizer.json", *SPECIAL_TOKEN_FILES]
    if not (Path(directory) / "tokenizer.model").is_file():
        names += CONFIG_FILES
    return [Path(directory, name) for name in names if Path(directory, name).is_file()]


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Check that every token has a row of the embedding table, which may have more rows.

    Args:
        tokenizer: The tokenizer.
        rows: Number of rows of the embedding table.

    Raises:
        CheckpointError: The tokenizer has more ids than the embedding table has rows.
    """
    if tokenizer.vocab_size <= rows:
        return
    surplus = ", ".join(repr(token) for token in tokenizer.tokens(range(rows, min(tokenizer.vocab_size, rows + 3))))
    raise CheckpointError(
        f"the tokenizer does not match the embeddings: it has {tokenizer.vocab_size} tokens, the embedding table has "
        f"{rows} rows, so none for {surplus}{', …' if tokenizer.vocab_size > rows + 3 else ''}; use the tokenizer that "
        "came with these weights, or remove tokens that were added to it (added_tokens.json, tokenizer_config.json)"
    )


def _load_sentencepiece(directory: Path) -> SentencePieceTokenizer:
    import sentencepiece

    path = directory / "tokenizer.model"
    data = read_bytes(path)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        hint = "nor is Llama 3's tokenizer.model: use its tokenizer.json, and remove tokenizer.model"
        raise CheckpointError(f"{path} is not a SentencePiece model ({hint})") from error
    declared = read_special_tokens(directory)
    own = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
    roles = {role: processor.id_to_piece(token_id) for role, token_id in own.items() if token_id >= 0} | declared.roles
    ids = dict(declared.ids)
    for content in [*(roles[role] for role in ROLES if role in roles), *declared.flags]:
        if content not in ids:
            token_id = processor.piece_to_id(content)
            known = processor.id_to_piece(token_id) == content
            ids[content] = token_id if known else max([processor.get_piece_size(), *(i + 1 for i in ids.values())])
    role_ids = {role: ids[content] for role, content in roles.items()}
    _require_roles(role_ids, path, ("bos", "eos"))
    hidden = declared.hidden | set(roles.values())
    special_tokens = [
        SpecialToken(content, token_id, *declared.flags.get(content, (False, False)), hidden=content in hidden)
        for content, token_id in ids.items()
    ]
    return SentencePieceTokenizer(processor, special_tokens, role_ids, declared.add_bos is not False)


def _load_json(directory: Path) -> JsonTokenizer:
    import tokenizers

    path = directory / "tokenizer.json"
    data = read_bytes(path)
    _check_json_ids(parse_object(data, str(path), CheckpointError), path)
    try:
        library = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{path} is not a file of the tokenizers library: {format_error(error)}") from error
    declared = read_special_tokens(directory)
    role_ids, eos_ids = read_config_token_ids(directory)
    for role, content in declared.roles.items():
        token_id = library.token_to_id(content)
        if token_id is not None:
            role_ids[role] = token_id
    role_ids = {role: token_id for role, token_id in role_ids.items() if library.id_to_token(token_id)}
    starts_with_bos = _starts_with_bos(library, role_ids.get("bos"), declared, directory)
    _require_roles(role_ids, path, ("bos", "eos") if starts_with_bos else ("eos",))
    contents = map(library.id_to_token, role_ids.values())
    flags = {content: (False, False) for content in contents if content}
    for token in library.get_added_tokens_decoder().values():
        if token.special or token.content in flags:
            flags[token.content] = (token.lstrip, token.rstrip)
    ids = ((content, library.token_to_id(content)) for content in flags)
    special_tokens = [SpecialToken(content, i, *flags[content]) for content, i in ids if i is not None]
    eos_ids = [token_id for token_id in eos_ids if library.id_to_token(token_id)]
    return JsonTokenizer(library, special_tokens, role_ids, starts_with_bos=starts_with_bos, extra_eos_ids=eos_ids)


def _starts_with_bos(library: Any, bos_id: int | None, declared: SpecialTokenConfig, directory: Path) -> bool:
    """Return whether prompts start with the BOS: as configured, or else as the library's post-processor does.

    Without either, they start with a BOS that tokenizer_config.json or special_tokens_map.json names, or, if neither
    file exists, with one that config.json names.
    """
    if declared.add_bos is not None:
        return declared.add_bos
    if library.post_processor is not None:
        return bos_id is not None and library.encode("").ids[:1] == [bos_id]
    return "bos" in declared.roles or not any((directory / name).is_file() for name in SPECIAL_TOKEN_FILES)


def _check_json_ids(fields: Mapping[str, Any], path: Path) -> None:
    """Check that all ids of a tokenizer.json are valid, because the library renumbers invalid ones."""
    model, added = fields.get("model"), fields.get("added_tokens") or []
    if not isinstance(model, Mapping) or not isinstance(added, list):
        raise CheckpointError(f"{path}: not a tokenizer (no model, or added_tokens is not a list)")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, Mapping):
        invalid = (token for token, i in vocabulary.items() if type(i) is not int or not 0 <= i <= LARGEST_INTEGER)
        for token in itertools.islice(invalid, 1):
            get_integer(vocabulary, token, f"{path}: model.vocab", CheckpointError, low=0)
    for token in added:
        if not isinstance(token, Mapping) or not isinstance(token.get("content"), str) or not token["content"]:
            raise CheckpointError(f"{path}: added_tokens: {format_value(token)} is not a token with content")
        get_integer(token, "id", f"{path}: added_tokens", CheckpointError, low=0)


def _require_roles(role_ids: Mapping[str, int], path: Path, required: Iterable[str]) -> None:
    missing = [role for role in required if role not in role_ids]
    if missing:
        problem = f"{path} and the files next to it declare no {' and no '.join(missing)} token"
        raise CheckpointError(f"{problem}: add tokenizer_config.json from the folder of the language model")
