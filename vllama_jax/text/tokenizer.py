"""A folder with a LLaMA-family tokenizer in, ids and text out.

Two kinds of folder. With `tokenizer.model`, SentencePiece does the pieces and we split at special tokens ourselves, so
that ids and text equal those of the reference (the slow LlamaTokenizer of transformers 4.28, which the released weights
were trained with). With only `tokenizer.json` (Llama 3 and newer), the `tokenizers` library does the pieces.
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
    """A token found in a text as a whole, before the text is cut into pieces.

    `lstrip` and `rstrip` say whether white space on that side of it is dropped, `hidden` whether `skip_special` leaves
    it out of decoded text.
    """

    content: str
    id: int
    lstrip: bool
    rstrip: bool
    hidden: bool = True


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
        bos_id: What a prompt starts with; None where it starts with its first text (Qwen).
        eos_id, eos_ids: What ends an answer: the first, and all.
        unk_id: the unknown token, None where there is none (Llama 3).
        pad_id: the padding token; without one the unknown token stands in, as in the reference, or else the end token.
        vocab_size: all tokens, added ones included, but not the media placeholder.
        media_id: where the reference puts `<ImageHere>`: the first id after the vocabulary.
        directory: where `load_tokenizer` read it; None for one that was made in another way.
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
        """Set up what all tokenizers share.

        Args:
            special_tokens: All of them.
            role_ids: The ids of "bos", "eos", "unk" and so on.
            library_size: How many ids the library behind this class knows; special tokens may lie beyond.
            starts_with_bos: Whether prompts start with the BOS.
            more_eos_ids: Ids that end an answer besides that of the role.
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
        """The BOS in a list of its own, or nothing."""
        return [] if self.bos_id is None else [self.bos_id]

    def encode(self, text: str, bos: bool = False, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; halves of surrogate pairs (broken bytes on a command line) become "?".
            bos: put what a prompt starts with first.
            special: whether `</s>`, `<ImageHere>` and the like stand for their ids; if not, they are plain characters.
        """
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = self.bos_ids if bos else []
        if not special:
            return ids + self._encode_plain(text)
        for piece in self._split(text):
            token = self._by_content.get(piece)
            ids.extend([token.id] if token else self._encode_plain(piece))
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids, without any clean-up of spaces.

        Tokens beyond the library's vocabulary, such as the media placeholder, are set off by spaces as in transformers
        4.28. Ids beyond the vocabulary (embedding tables are sometimes padded) have no text.
        """
        texts = []
        for known, run in itertools.groupby(self._shown(ids, skip_special), key=lambda i: i < self._base_vocab_size):
            same = list(run)
            texts += [self._decode_base(same)] if known else self.tokens(same)
        return " ".join(texts)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Each id as the piece it stands for, such as "▁dog"; "" for an id beyond the vocabulary."""
        return [self._by_id[i].content if i in self._by_id else self._base_token(i) for i in map(int, ids)]

    def special_token_id(self, content: str) -> int | None:
        """The id of a special token by its text; None where there is none."""
        token = self._by_content.get(content)
        return None if token is None or content == MEDIA_TOKEN else token.id

    def decode_stable_prefix(self, ids: Iterable[int]) -> str:
        """The part of `decode(ids, skip_special=True)` that further ids cannot change.

        Left out is an end that may become another character when its remaining bytes arrive.
        """
        format_value = self._shown(ids, skip_special=True)
        return self.decode(format_value[: len(format_value) - self._count_unstable(format_value)]).rstrip(REPLACEMENT)

    @abc.abstractmethod
    def _encode_plain(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""

    @abc.abstractmethod
    def _decode_base(self, ids: list[int]) -> str:
        """Text of ids that the library knows."""

    @abc.abstractmethod
    def _base_token(self, token_id: int) -> str:
        """The piece of an id, "" where the library knows none."""

    def _count_unstable(self, ids: list[int]) -> int:
        """How many ids at the end may yet change characters before them that are already whole."""
        return 0

    def _shown(self, ids: Iterable[int], skip_special: bool) -> list[int]:
        """Those of the ids that have a text."""
        left_out = self._hidden_ids if skip_special else ()
        return [i for i in map(int, ids) if (i < self._base_vocab_size or i in self._by_id) and i not in left_out]

    def _split(self, text: str) -> list[str]:
        """The text cut at special tokens, white space beside them dropped where they say so; no empty pieces."""
        pieces = self._special.split(text)
        for i in range(1, len(pieces), 2):  # odd places hold the special tokens
            token = self._by_content[pieces[i]]
            if token.lstrip:
                pieces[i - 1] = pieces[i - 1].rstrip()
            if token.rstrip:
                pieces[i + 1] = pieces[i + 1].lstrip()
        return [piece for piece in pieces if piece]


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model`. Each text between special tokens gets SentencePiece's leading "▁" of its own."""

    def __init__(
        self, processor: Any, special_tokens: Iterable[SpecialToken], role_ids: Mapping[str, int], starts_with_bos: bool
    ):
        super().__init__(special_tokens, role_ids, processor.get_piece_size(), starts_with_bos=starts_with_bos)
        self._processor = processor

    def _encode_plain(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _decode_base(self, ids: list[int]) -> str:
        """Special tokens are written as they are.

        The reference puts a space before the *text* that a special token ends, not before the token: "a</s>b" comes
        back as " a</s>b".
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
    """`tokenizer.json`, through the `tokenizers` library."""

    def __init__(
        self, library: Any, special_tokens: Iterable[SpecialToken], role_ids: Mapping[str, int], **options: Any
    ):
        """`options`: those of Tokenizer."""
        added = library.get_added_tokens_decoder()
        ids = library.get_vocab(with_added_tokens=True).values()
        super().__init__(special_tokens, role_ids, max([-1, *ids, *added]) + 1, **options)
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # in what is left to the library, special tokens are plain text
        self._library = library

    def _encode_plain(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def _decode_base(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)

    def _base_token(self, token_id: int) -> str:
        return self._library.id_to_token(token_id) or ""

    def _count_unstable(self, ids: list[int]) -> int:
        """The library turns a whole run of byte tokens into replacement characters when one of them does not fit."""
        tokens = map(self._base_token, reversed(ids))
        return sum(1 for _ in itertools.takewhile(re.compile("<0x[0-9A-F]{2}>").fullmatch, tokens))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a folder: `tokenizer.model` if there is one, else `tokenizer.json`.

    Raises:
        CheckpointError: there is none, or a file of it cannot be read.
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
    """The files to copy so that `load_tokenizer` reads the same tokenizer from the copy."""
    names = ["tokenizer.model", "tokenizer.json", *SPECIAL_TOKEN_FILES]
    if not (Path(directory) / "tokenizer.model").is_file():
        names += CONFIG_FILES
    return [Path(directory, name) for name in names if Path(directory, name).is_file()]


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Embedding tables may have rows to spare, but every token needs one.

    Raises:
        CheckpointError: the tokenizer has more ids than the embedding table has rows.
    """
    if tokenizer.vocab_size <= rows:
        return
    surplus = ", ".join(repr(token) for token in tokenizer.tokens(range(rows, min(tokenizer.vocab_size, rows + 3))))
    raise CheckpointError(
        f"a tokenizer that does not fit the embeddings: it has {tokenizer.vocab_size} tokens, the embedding table has "
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
        hint = "Llama 3's tokenizer.model is none: take its tokenizer.json instead and leave tokenizer.model out"
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
    ids = ((content, library.token_to_id(content)) for content in flags)  # each has one
    special_tokens = [SpecialToken(content, i, *flags[content]) for content, i in ids if i is not None]
    eos_ids = [token_id for token_id in eos_ids if library.id_to_token(token_id)]
    return JsonTokenizer(library, special_tokens, role_ids, starts_with_bos=starts_with_bos, extra_eos_ids=eos_ids)


def _starts_with_bos(library: Any, bos_id: int | None, declared: SpecialTokenConfig, directory: Path) -> bool:
    """Whether prompts start with the BOS: what the configuration says, or else what the library's post-processor does.

    Without either, a BOS that tokenizer_config.json or special_tokens_map.json names is put first, and where there are
    no such files any BOS that config.json names.
    """
    if declared.add_bos is not None:
        return declared.add_bos
    if library.post_processor is not None:
        return bos_id is not None and library.encode("").ids[:1] == [bos_id]
    return "bos" in declared.roles or not any((directory / name).is_file() for name in SPECIAL_TOKEN_FILES)


def _check_json_ids(fields: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError where an id in a tokenizer.json is none; the library renumbers some."""
    model, added = fields.get("model"), fields.get("added_tokens") or []
    if not isinstance(model, Mapping) or not isinstance(added, list):
        raise CheckpointError(f"{path}: not a tokenizer (no model, or added_tokens is no list)")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, Mapping):
        wrong = (piece for piece, i in vocabulary.items() if type(i) is not int or not 0 <= i <= LARGEST_INTEGER)
        for piece in itertools.islice(wrong, 1):
            get_integer(vocabulary, piece, f"{path}: model.vocab", CheckpointError, low=0)
    for token in added:
        if not isinstance(token, Mapping) or not isinstance(token.get("content"), str) or not token["content"]:
            raise CheckpointError(f"{path}: added_tokens: {format_value(token)} is not a token with content")
        get_integer(token, "id", f"{path}: added_tokens", CheckpointError, low=0)


def _require_roles(role_ids: Mapping[str, int], path: Path, required: Iterable[str]) -> None:
    missing = [role for role in required if role not in role_ids]
    if missing:
        problem = f"{path} and the files beside it name no {' and no '.join(missing)} token"
        raise CheckpointError(f"{problem}: add tokenizer_config.json from the folder of the language model")
