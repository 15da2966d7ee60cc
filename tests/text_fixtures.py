"""A tokenizer with one id per character, and a readable form of training texts."""

import itertools

import numpy as np

from vllama_jax.text.tokenizer import SpecialToken, Tokenizer
from vllama_jax.text.training import IGNORE_INDEX


class SpellingTokenizer(Tokenizer):
    """One id per character, with "▁" before each text; "###" at the beginning is one token, as in LLaMA."""

    alone = 0x110000  # the id of "▁###"; ids of characters are their code points, and <unk> <s> </s> are 0 1 2

    def __init__(self):
        contents = ("<unk>", "<s>", "</s>")
        special_tokens = [SpecialToken(content, i, lstrip=False, rstrip=False) for i, content in enumerate(contents)]
        super().__init__(special_tokens, {"unk": 0, "bos": 1, "eos": 2}, self.alone + 1)

    def _encode_plain(self, text):
        if text.startswith("###"):
            return [self.alone, *map(ord, text[3:])]
        return [ord(letter) for letter in "▁" + text] if text else []

    def _decode_base(self, ids):
        return "".join(self.tokens(ids)).replace("▁", " ").removeprefix(" ")

    def _base_token(self, token_id):
        return "▁###" if token_id == self.alone else chr(token_id)


SPELLING = SpellingTokenizer()


def mark_labels(text, tokenizer=SPELLING):
    """Return the tokens as text, with "*" for media tokens and «…» around labels; check the invariants of all texts."""
    assert text.ids.dtype == text.labels.dtype == np.int32
    assert text.is_media.dtype == bool
    assert len(text.ids) == len(text.is_media) == len(text.labels)
    assert not text.ids[text.is_media].any()
    labeled = text.labels != IGNORE_INDEX
    assert (text.labels[labeled] == text.ids[labeled]).all()
    assert not (labeled & text.is_media).any()
    tokens = ["*" if here else token for token, here in zip(tokenizer.tokens(text.ids), text.is_media, strict=True)]
    runs = itertools.groupby(zip(tokens, labeled, strict=True), key=lambda pair: pair[1])
    joined = [(is_labeled, "".join(string for string, _ in run)) for is_labeled, run in runs]
    return "".join(f"«{run}»" if is_labeled else run for is_labeled, run in joined)
