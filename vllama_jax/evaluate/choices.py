"""Detection of the choice that an answer names, by its letter or by its text."""

import re
import string
from collections.abc import Sequence

from vllama_jax.evaluate.text_normalization import fold_characters, normalize_answer

MARKUP = re.compile(r"[*`$_]|\\(?:text|mathrm|mathbf|textbf)\b")  # Markdown and LaTeX around a letter
ANSWER = r"(?i:answer|答案)"
IS = r"(?i:\s+(?:is|would be|should be|must be|will be)\b|是|为)?"
OPTION = r"(?i:option|choice|letter)"
CHOICE_VERBS = r"(?i:choose|pick|select|go with|choosing|it is|it's|must be|should be|选)"
# Words after a letter that is a choice ("A because"); other words make it an article or a pronoun ("A dog", "I see").
CONTINUATION = r"(?:because|since|as|and|but|so|which|that|is|was|due|for|based|given|in|not|instead|rather|here)\b"
REJECTED_BEFORE = re.compile(r"(?i:\bnot|n't|\bnor|\bneither|\brule out|\beliminate|\bexcept|\bunlike)\s*[\"'(\[{]*$")
REJECTED_AFTER = re.compile(
    r"[\"')\]}]*,?\s*(?i:(?:but\s+)?(?:(?:it|this|that|which)\s+)?(?:is|was|seems|cannot be|can't be|isn't)\s+"
    r"(?:clearly\s+|also\s+)?(?:not|incorrect|wrong|false|excluded|ruled out)\b)"
)


def find_choice_letter(answer: str, choices: Sequence[str]) -> str | None:
    r"""Find the choice that an answer names.

    The first of these forms that occurs decides: the text of one choice and nothing else; the last \boxed{B}; the last
    "answer is B"; a line that begins with a letter ("B", "(B)", "b."); "option B" or "I choose B"; one letter in
    brackets; the text of exactly one choice. A letter that the answer rejects ("(A) is incorrect") does not count.

    Args:
        answer: The answer of a model.
        choices: The texts of the choices.

    Returns:
        The letter of the choice; None if the answer names none, or several.
    """
    text = fold_characters(MARKUP.sub("", answer)).strip()
    letters = string.ascii_uppercase[: len(choices)]
    if (number := _match_whole_text(text, choices)) is not None:
        return letters[number]
    capital, small = f"[{letters}]", f"[{letters}{letters.lower()}]"
    one = rf"({capital}(?![\w'])|{small}(?=\s*(?:[).:,;!}}\]\"']|$)))"
    for pattern, last in (
        (rf"\\boxed\s*\{{[\s({{]*{one}", True),
        (rf"{ANSWER}[\"']?{IS}[\s:=\-\"'(\[{{>]*(?:{OPTION}\s*)?[\"'(\[{{]*{one}", True),
        (rf"^[^\w\n]*({capital}(?:(?=[).:,\]])|(?=\s*$))|{small.lower()}(?=[).:\]]))", False),
    ):
        if found := _find_letters(pattern, text, letters):
            return found[-1 if last else 0]
    for pattern in (
        rf"\b{OPTION}\s*:?\s*[\"'(\[]*{one}|{CHOICE_VERBS}\s*(?:{OPTION}\s*)?[\"'(\[]*({capital})(?=[).,;:!\]]|\s*$)",
        rf"[(\[{{]\s*({small})\s*(?:[)\]}}.:,]|$)",
    ):
        if len(set(found := _find_letters(pattern, text, letters))) == 1:
            return found[0]
    return _match_contained_text(text, choices, letters)


def _find_letters(pattern: str, text: str, letters: str) -> list[str]:
    """Return the letters that a pattern finds, except rejected ones, words, and one of two ("A or B")."""
    found = []
    for match in re.finditer(pattern, text, re.MULTILINE):
        group = next(number for number, value in enumerate(match.groups(), 1) if value)
        start, rest = match.start(group), text[match.end(group) :]
        letter = match[group]
        if REJECTED_BEFORE.search(text[:start]) or REJECTED_AFTER.match(rest):
            continue
        if letter in "AaIi" and re.match(r"\s+\w", rest) and not re.match(rf"\s+{CONTINUATION}", rest, re.IGNORECASE):
            continue
        others = r"[)\]]?\s*(?:or|and|/)\s*[(\[]?"
        if re.match(rf"{others}[{letters}]\b", rest) or re.search(rf"\b[{letters}]{others}$", text[:start]):
            continue
        found.append(letter.upper())
    return found


def _match_whole_text(text: str, choices: Sequence[str]) -> int | None:
    """Return the number of the choice whose text is the whole answer, apart from "The answer is"."""
    stated = re.sub(
        rf"^\W*(?:the\s+)?(?:(?:final|correct|right|best)\s+)?{ANSWER}{IS}[\s:=(\[\"']*", "", text, flags=re.IGNORECASE
    )
    if len(re.sub(r"\W", "", stated)) < 2 and not stated.strip(" .").isdigit():
        return None  # a single letter is the letter of a choice, even if it is also the text of one
    same = [number for number, choice in enumerate(choices) if normalize_answer(choice) == normalize_answer(stated)]
    return same[0] if len(same) == 1 else None


def _match_contained_text(text: str, choices: Sequence[str], letters: str) -> str | None:
    words = normalize_answer(text)
    named = [choice for choice in choices if is_sublist(normalize_answer(choice), words)]
    longest = max(named, key=len, default="")  # "a red ball" contains "a ball"
    if named and all(is_sublist(normalize_answer(choice), normalize_answer(longest)) for choice in named):
        return letters[list(choices).index(longest)]
    return None


def is_sublist(shorter: Sequence[str], longer: Sequence[str]) -> bool:
    """Return whether `longer` contains the words of `shorter` one after the other; False for no words."""
    return bool(shorter) and any(longer[i : i + len(shorter)] == shorter for i in range(len(longer) - len(shorter) + 1))
