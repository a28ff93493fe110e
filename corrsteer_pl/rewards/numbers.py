"""Numbers in text: the value of a gold answer, and the final number of a response, both exact fractions."""

import re
import unicodedata
from decimal import Decimal, localcontext
from fractions import Fraction

SPACES = " \u00a0\u2007\u2009\u202f"
# Exponents and lengths above these are no answers, and would take long to compute.
LARGEST_EXPONENT, MOST_DIGITS = 400, 1000
CURRENCY = r"[$\u20ac\u00a3\u00a5\u20b9]"
# Characters that join digits to one expression: 7:30, 3/8, 1,234.5, 12-14, 2^10.
_JOINT = rf"(?:[.,:'\u2019_\u2013-]|[{SPACES}]?/[{SPACES}]?|\^-?)"
_DIGITS = rf"(?:\d{{1,3}}(?:[{SPACES}]\d{{3}})+(?!\d)|\d+)"
EXPRESSION = re.compile(
    # A minus after a digit, a letter or a bracket is a subtraction.
    rf"(?P<sign>(?<![\w)])[-\u2013])?(?:{CURRENCY}(?P<inner>-)?)?"
    rf"(?P<body>\d+[{SPACES}]\d+/\d+(?![\d/])|(?:{_DIGITS}|(?<![\d.])\.\d+)(?:{_JOINT}\d+)*)"
    r"(?P<exponent>[eE][+-]?\d+(?!\w|\.\d))?"
    r"(?P<power>\s?[x\u00d7*\u00b7]\s?10\^-?\d+)?"
)
# 1234.5 or 1,234.5, with one kind of separator between thousands.
_SIMPLE = re.compile(rf"(\d{{1,3}}(?:(?P<mark>[,'\u2019_{SPACES}])\d{{3}}(?:(?P=mark)\d{{3}})*)?|\d+)?(\.\d+)?")
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), ","),
    (re.compile(r"(?<=\d)\\[,;: ](?=\d)"), "\u2009"),
    (re.compile(r"\\(?:times|cdot)\b"), "\u00d7"),
    (re.compile(r"\\(?=\$)"), ""),
    (re.compile(r"\^\{(-?\d+)\}"), r"^\1"),
)
_SUPERSCRIPT = re.compile("(?<=\\d)\u207b?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_VULGAR = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e\u2189])")
_CHARACTERS = {
    **dict.fromkeys(map(ord, "\u2010\u2011\u2212\ufe63\uff0d"), "-"),
    ord("\u2044"): "/", ord("\u066b"): ".", ord("\u066c"): ",", ord("\uff0e"): ".",
}  # fmt: skip
# Next to the number of a gold answer, these make another number of it: sqrt(2), 5!, 2x + 1, 3 million.
_BEFORE = re.compile(
    r"(?:[\u221a\u221b<>\u2264\u2265~\u2248\u00b1^\u00d7\u00f7/+]|\b(?:sqrt|log|ln|exp|sin|cos|tan)\s*[({\[]?)\s*$"
)
_AFTER = re.compile(
    r"\s?(?:[!^\u00d7\u00f7+\u03c0\u221a]|\*\s?\w|(?:pi|hundred|thousand|million|billion|trillion|k|K|M|bn)\b)"
)
# A comparison, x >= 5, has no one number.
_COMPARISON = re.compile(r"[<>!~\u2248]=")


def plain_digits(text: str) -> str:
    r"""A text with one notation for digits, minus signs, fractions and powers.

    Example:
        >>> plain_digits(r"1½, \frac{3}{4}, 9{,}500, 10⁵")
        '1 1/2, 3/4, 9,500, 10^5'
    """
    text = "".join(
        str(unicodedata.decimal(char)) if char.isdecimal() and not char.isascii() else char for char in text
    ).translate(_CHARACTERS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _SUPERSCRIPT.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]).replace("\u2212", "-"), text)

    def vulgar(match: re.Match[str]) -> str:
        return (f"{match[1]} " if match[1] else "") + unicodedata.normalize("NFKC", match[2]).replace("\u2044", "/")

    return _VULGAR.sub(vulgar, text)


def _simple(text: str) -> Fraction | None:
    if not text or len(text) > MOST_DIGITS or not _SIMPLE.fullmatch(text):
        return None
    digits = re.sub(r"[^\d.]", "", text)
    return Fraction(f"0{digits}" if digits.startswith(".") else digits)


def _power(base: Fraction | None, exponent: str) -> Fraction | None:
    if base is None or len(exponent) > 5 or abs(int(exponent)) > LARGEST_EXPONENT:
        return None
    digits = len(str(max(abs(base.numerator), base.denominator)))
    if digits * abs(int(exponent)) > MOST_DIGITS or (base == 0 and int(exponent) < 0):
        return None
    return base ** int(exponent)


def _body(text: str) -> Fraction | None:
    """The value of 1234.5, 3/4, 1 3/4 or 2^10; None for anything else."""
    if mixed := re.fullmatch(rf"(\d+)[{SPACES}](\d+/\d+)", text):
        whole, part = _simple(mixed[1]), _body(mixed[2])
        return whole + part if whole is not None and part is not None and part < 1 else None
    if len(halves := re.split(rf"[{SPACES}]?/[{SPACES}]?", text)) == 2:
        above, below = map(_simple, halves)
        return above / below if above is not None and below else None
    base, caret, exponent = text.partition("^")
    if caret:
        return _power(_simple(base), exponent) if re.fullmatch(r"-?\d+", exponent) else None
    return _simple(text)


def value_of(match: re.Match[str]) -> Fraction | None:
    """The exact value of a match of :data:`EXPRESSION`; None if it is not one number, such as 7:30 or 12-14."""
    value = _body(match["body"])
    for text in (match["exponent"], match["power"]):
        if text:
            factor = _power(Fraction(10), text[1:] if text[0] in "eE" else text.rpartition("^")[2])
            value = None if value is None or factor is None else value * factor
    return -value if value is not None and (match["sign"] or match["inner"]) else value


def _last_of_several(body: str) -> Fraction | None:
    """The last number of a list without spaces, 1,2,3, or of a difference, 5-4; None for dates, ranges and times."""
    parts = body.split(",")
    if len(parts) > 2 and all(part.isdecimal() and len(part) != 3 for part in parts):
        return _simple(parts[-1])
    parts = body.split("-")
    if len(parts) == 2:
        first, second = map(_simple, parts)
        return second if first is not None and second is not None and first > second else None
    return None


def final_number(text: str) -> Fraction | None:
    r"""The first number after the first ``####``; without one, the last number of the text; else None.

    Thousands separators (comma, apostrophe, or space), signs, currencies, decimals, fractions, powers of ten, and
    their notation in LaTeX are understood. None as well if the number stands in something else: a time (7:30), a
    range (12-14), a date, or a decimal comma (1,5), which cannot be told from a list.

    Example:
        >>> final_number("16 - 3 = 13\n#### 1,234.50 dollars, not 9"), final_number("5-4 is 1."), final_number("?")
        (Fraction(2469, 2), Fraction(1, 1), None)
    """
    plain = plain_digits(text)
    if match := EXPRESSION.search(plain.partition("####")[2]):
        return value_of(match)
    matches = list(EXPRESSION.finditer(plain))
    if not matches:
        return None
    # Without a mark the text may be a calculation, of which the last number is the result.
    value = value_of(matches[-1])
    return _last_of_several(matches[-1]["body"]) if value is None else value


def gold_number(text: str) -> Fraction | None:
    """The value of a gold answer: that after ``####``, or else after the last ``=``, or else of the whole text.

    Returns:
        None if there is no number, more than one, or something else than a number, such as 7:30, 12-14 or 1,5.

    Example:
        >>> [gold_number(text) for text in ("3/8", "1e5", "$1,234", "x = 5.", "12-14", "1,5", "3 of 4")]
        [Fraction(3, 8), Fraction(100000, 1), Fraction(1234, 1), Fraction(5, 1), None, None, None]
    """
    plain = plain_digits(text)
    marked = plain.partition("####")[2] or plain
    line = next((line for line in marked.splitlines() if line.strip()), "")
    answer = line.rpartition("=")[2]
    matches = list(EXPRESSION.finditer(answer))
    if len(matches) != 1 or _COMPARISON.search(line):
        return None
    before, after = answer[: matches[0].start()], answer[matches[0].end() :]
    return None if _BEFORE.search(before) or _AFTER.match(after) else value_of(matches[0])


def written(value: Fraction) -> str:
    """A number as text: 18, 0.375 or, where decimals do not end, 1/3.

    Example:
        >>> written(Fraction(18)), written(Fraction(3, 8)), written(Fraction(-1, 3))
        ('18', '0.375', '-1/3')
    """
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest > 1:
        return str(value)
    with localcontext() as context:
        context.prec = 4 * MOST_DIGITS
        return f"{Decimal(value.numerator) / Decimal(value.denominator):f}"


def number(text: str, gold: str) -> float:
    """1 if the final number of the response is the number of the gold text."""
    wanted = gold_number(gold)
    return float(wanted is not None and final_number(text) == wanted)
