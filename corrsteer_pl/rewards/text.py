"""Rewards of one response by its text alone: strings in, a number in [0, 1] out."""

import re
import string
import unicodedata
from collections import Counter

REFUSAL = re.compile(
    r"(no,|unfortunately,|sorry,)?\s*"
    r"(sorry\b|i (cannot|can't|can not)\b(?! wait)|i('m| am)( \w+)? sorry|i apologi[sz]e|i (won't|will not|refuse)\b"
    r"|i('m| am) (unable|not able)|i must (decline|refuse)|as an ai\b)"
)
# Punctuation, except decimal points within numbers and minus signs before them, which change the number.
INNER_PUNCTUATION = re.compile(rf"(?!(?<=\d)\.(?=\d))(?!(?<!\w)-(?=\d))[{re.escape(string.punctuation)}]")
# In quotes, bold, brackets or a box; a capital letter that stands alone.
ANSWER = re.compile(
    r"(?i:answer)(?:\s+(?i:is)\b|\s*:)\s*:?(?:\s*(?i:option))?[\s*_\"'`(\[{$\\]*(?:boxed\{)?([A-Z])(?![\w'])"
)
# Scripts that write words without spaces between them, or attach endings to them.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3130-\u318f\u3400-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)


def is_refusal(text: str) -> bool:
    """Whether a response begins by refusing.

    Example:
        >>> is_refusal(" I'm sorry, but no."), is_refusal("Sure! Sorry for the delay.")
        (True, False)
    """
    return REFUSAL.match(text.lower().replace("\u2019", "'").lstrip(" \t\n*_\"'#>")) is not None


def chosen_letter(text: str) -> str | None:
    """The capital letter that a response begins with, standing alone, in brackets or not.

    Example:
        >>> chosen_letter(" B"), chosen_letter("(B) Rome"), chosen_letter("Because")
        ('B', 'B', None)
    """
    match = re.match(r"\s*\(?([A-Z])\b", text)
    return match[1] if match else None


def letter(text: str, gold: str) -> float:
    """1 if the response begins with the gold letter, standing alone."""
    return float(chosen_letter(text) == gold)


def final_letter(text: str, gold: str) -> float:
    """1 if the last letter that the response calls its answer is the gold one.

    Example:
        >>> final_letter("A is tempting, but the answer is (C).", "C"), final_letter("I do not know.", "C")
        (1.0, 0.0)
    """
    answers = ANSWER.findall(text)
    return float(bool(answers) and answers[-1] == gold)


def exact(text: str, gold: str) -> float:
    """1 if the response is the gold text, up to case and surrounding space."""
    return float(text.strip().lower() == gold.strip().lower())


def normalised(text: str) -> str:
    """Lower case, without articles, superfluous space and punctuation, but for that inside numbers.

    Source:
        The answer normalisation of SQuAD (Rajpurkar et al. 2016), which makes 35 of 3.5; this does not.

    Example:
        >>> normalised("The  Eiffel-Tower.")
        'eiffeltower'
    """
    plain = INNER_PUNCTUATION.sub("", text.lower())
    return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))


def first_line(text: str) -> str:
    """The first line with something in it; what a model says after its answer is not judged."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def match(text: str, gold: str) -> float:
    """1 if the response, or its first line, is the gold text after normalisation."""
    if not normalised(gold):
        # Nothing but articles and punctuation, such as the blood group A.
        return exact(first_line(text), gold)
    return float(normalised(gold) in (normalised(text), normalised(first_line(text))))


def token_f1(text: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the first line's words, after normalisation.

    Example:
        >>> token_f1("Sir Isaac Newton", "Isaac Newton")
        0.8
    """
    given, wanted = normalised(first_line(text)).split(), normalised(gold).split()
    if not given or not wanted:
        return float(given == wanted)
    shared = (Counter(given) & Counter(wanted)).total()
    return 2 * shared / (len(given) + len(wanted))


def _words(text: str) -> str:
    """Case-folded, composed, with one space between words and one kind of apostrophe."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().replace("\u2019", "'").split())


def contains(text: str, gold: str) -> float:
    """1 if the gold text occurs in the response as whole words, in any case.

    A number is not contained in a longer one, or in its negative. Scripts that do not separate words by spaces, such
    as Chinese, are searched without regard to words.

    Example:
        >>> contains("It is now.", "no"), contains("No, never.", "no"), contains("3.5", "3")
        (0.0, 1.0, 0.0)
    """
    wanted = _words(gold)
    letter = f"[^\\W{UNSPACED}]"
    starts = f"(?<!{letter})" if re.match(letter, wanted) else ""
    ends = f"(?!{letter})" if re.search(f"{letter}$", wanted) else ""
    if re.match(r"\d", wanted):
        starts += r"(?<!\d[.,])(?<!^[-\u2212])(?<![^\w)][-\u2212])"
    if re.search(r"\d$", wanted):
        ends += r"(?![.,]\d)"
    return float(re.search(starts + re.escape(wanted) + ends, _words(text)) is not None)


def matches(text: str, gold: str) -> float:
    """1 if the regular expression ``gold`` is found in the response."""
    return float(re.search(gold, text) is not None)
