"""Normalization of texts for comparison: variants in writing the same words are removed."""

import re
import unicodedata

ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
TO_DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"), "-")
APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u02b9\u00b4\u0060\u2032"), "'")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
NOT_IN_NUMBERS = re.compile(r"(?<!\d)\.|\.(?!\d)|(?<=[\w.])-|-(?!\.?\d)")  # points and hyphens outside of numbers
# Scripts without spaces between words: each character counts as a word.
IDEOGRAPH = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
VALUE_DECOMPOSITIONS = ("<super>", "<sub>", "<fraction>")  # these decompositions change the value: 10² is not 102


def fold_characters(text: str) -> str:
    """Unify variants of characters: composed form, usual width, ASCII digits, dashes and apostrophes.

    Invisible characters (soft hyphens, zero-width spaces) are removed.
    """
    kept = (char for char in unicodedata.normalize("NFC", text) if unicodedata.category(char) != "Cf")
    folded = unicodedata.normalize("NFC", "".join(map(_fold_character, kept)))
    return folded.translate(DASHES).translate(APOSTROPHES)


def normalize_answer(text: str) -> list[str]:
    """Return the words of an answer as the VQA evaluation compares them.

    Case, punctuation and articles are removed, and number words become digits. A number keeps its sign and its decimal
    point, and loses commas between thousands. A text of only articles or punctuation is kept.
    """
    text = fold_characters(text).casefold().replace("'", "").strip()
    plain = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    plain = NOT_IN_NUMBERS.sub(" ", plain)
    plain = "".join(" " if char not in ".-" and _is_punctuation(char) else char for char in plain)
    words = [TO_DIGITS.get(word, word) for word in IDEOGRAPH.sub(r" \1 ", plain).split()]
    return [word for word in words if word not in ARTICLES] or words or text.split()


def _fold_character(char: str) -> str:
    if char.isascii() or unicodedata.decomposition(char).startswith(VALUE_DECOMPOSITIONS):
        return char
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    return unicodedata.normalize("NFKC", char)


def _is_punctuation(char: str) -> bool:
    """Return whether a character is punctuation or a sign; symbols with a meaning, such as emoji, are not."""
    category = unicodedata.category(char)
    return category[0] == "P" or category in ("Sc", "Sk", "Sm")
