"""A text's words as answers are compared: what is only another way to write the same thing is removed."""

import re
import unicodedata

ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
TO_DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"), "-")
APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u02b9\u00b4\u0060\u2032"), "'")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
NOT_IN_NUMBERS = re.compile(r"(?<!\d)\.|\.(?!\d)|(?<=[\w.])-|-(?!\.?\d)")  # a point or minus that is no part of one
# Scripts without spaces between words: each character is one.
IDEOGRAPH = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
VALUE_DECOMPOSITIONS = ("<super>", "<sub>", "<fraction>")  # 10² is not 102


def fold_characters(text: str) -> str:
    """One way to write each character: composed, in its usual width, ASCII's digits, dashes and apostrophes.

    Characters that show nothing (soft hyphens, zero-width spaces) are removed.
    """
    kept = (char for char in unicodedata.normalize("NFC", text) if unicodedata.category(char) != "Cf")
    folded = unicodedata.normalize("NFC", "".join(map(_fold_character, kept)))
    return folded.translate(DASHES).translate(APOSTROPHES)


def normalize_answer(text: str) -> list[str]:
    """An answer's words as the VQA evaluation compares them: no case, punctuation or articles; numbers as digits.

    A number keeps its sign and its decimal point, and loses commas between thousands. A text of articles or of
    punctuation alone keeps those.
    """
    text = fold_characters(text).casefold().replace("'", "").strip()
    plain = THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
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
    """Punctuation and signs, but not symbols that mean something by themselves, such as emoji."""
    category = unicodedata.category(char)
    return category[0] == "P" or category in ("Sc", "Sk", "Sm")
