"""Contract: a gold answer is one number, read exactly, or rejected; a response is compared with it exactly."""

import re
from fractions import Fraction

import pytest

from corrsteer_pl import TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import read_rows, write_jsonl
from corrsteer_pl.rewards import make_reward
from corrsteer_pl.tasks import make_task
from tests.conftest import SHARED

GSM8K = SHARED / "data" / "gsm8k"

# Values worked out by hand.
NUMBERS = {
    "3/8": Fraction(3, 8),
    "-3/8": Fraction(-3, 8),
    "3 / 8": Fraction(3, 8),
    "1 3/8": Fraction(11, 8),
    "½": Fraction(1, 2),
    "1½": Fraction(3, 2),
    r"\frac{3}{4}": Fraction(3, 4),
    "1e5": Fraction(100_000),
    "1E+06": Fraction(1_000_000),
    "2.5e-3": Fraction(25, 10_000),
    "3 \u00d7 10^5": Fraction(300_000),
    "3\u00d710⁵": Fraction(300_000),
    r"3 \times 10^{5}": Fraction(300_000),
    "2^10": Fraction(1024),
    "1,234": Fraction(1234),
    "1 234": Fraction(1234),
    "1\u202f234\u202f567": Fraction(1_234_567),
    "1\u00a0234.5": Fraction(12345, 10),
    "1'234": Fraction(1234),
    r"\boxed{$9{,}500}": Fraction(9500),
    "$1,000.50": Fraction(10005, 10),
    "-$7": Fraction(-7),
    "$-7": Fraction(-7),
    "\u22127": Fraction(-7),
    "50%": Fraction(50),
    "1.": Fraction(1),
    ".5": Fraction(1, 2),
    "x = 5.": Fraction(5),
    "#### 1,234": Fraction(1234),
    "**18**": Fraction(18),
    "\uff11\uff18": Fraction(18),
    "72, in total": Fraction(72),
    "9007199254740993": Fraction(9007199254740993),  # not a float
}
# Not one number, or ambiguous.
OTHERS = (
    "7:30", "1,5", "0,5", "12-14", "12\u201314", "1.000,5", "1/0", "2024-12-01", "1.2.3", "1,234,5", "1000,000",
    "1e999999999", "2^99999999", "9" * 5000, "1/2/3", "555-1234",
)  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_gold_and_response_have_the_exact_value(text):
    value = NUMBERS[text]
    number = make_reward("number")
    other = f"{value.numerator}/{value.denominator}"
    assert number([text, f"So it is {text}", f"#### {text}"], [other] * 3) == [1, 1, 1]
    assert number([other], [text]) == [1]
    near = f"{value.numerator + 1}/{value.denominator}"
    assert number([text], [near]) == number([near], [text]) == [0]


@pytest.mark.parametrize("text", OTHERS)
def test_what_is_not_one_number_is_rejected_as_gold_and_incorrect_as_a_response(text):
    last = re.findall(r"\d+", text)[-1]
    assert make_reward("number")([text, f"#### {text}"], [last] * 2) == [0, 0]
    generic = make_task("generic", {"answer": "a", "reward": "number"})
    with pytest.raises(UserError, match="row r has .* in the column 'a'"):
        generic.example({"prompt": "p", "a": text}, "r")
    with pytest.raises(UserError, match="row r has .* in the column 'answer'"):
        make_task("gsm8k", {}).example({"question": "q", "answer": f"2 + 2 = 4\n#### {text}"}, "r")


@pytest.mark.parametrize(
    "gold", ["3 of 4", "between 5 and 6", "5!", "sqrt(2)", r"\sqrt{2}", "√2", ">5", "x >= 5", "2π", "3 million", "ten"]
)
def test_gold_answers_that_contain_a_number_but_are_none(gold):
    with pytest.raises(UserError, match="row r has"):
        make_task("generic", {"answer": "a", "reward": "number"}).example({"prompt": "p", "a": gold}, "r")


def test_a_rejected_gold_answer_stops_before_anything_is_fitted(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"p{i}", "a": "7:30" if i == 3 else str(i)} for i in range(20)])
    data = TaskDataModule("generic", str(tmp_path / "rows.jsonl"), {"answer": "a", "reward": "number"})
    with pytest.raises(UserError, match="7:30"):
        data.setup("fit")


def lm_eval_gsm8k(text):
    """The strict and the flexible extraction of lm-eval's task gsm8k, with its clean-up, or None."""
    strict = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    flexible = ["".join(groups) for groups in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)]
    found = strict[:1] or flexible[-1:]
    return re.sub(r",|\$|\.$", "", found[0]) if found else None


@pytest.mark.skipif(not GSM8K.is_dir(), reason="no real rows on this machine")
@pytest.mark.parametrize("split", ["train", "test"])
def test_real_answers_have_the_values_that_lm_eval_extracts(split):
    task = make_task("gsm8k", {})
    for row in read_rows(GSM8K / f"{split}.jsonl"):
        example, wanted = task.example(row, "r"), lm_eval_gsm8k(row["answer"])
        assert example.gold == str(int(float(wanted)))
        for response in (f"The answer is {wanted}.", f"So she has ${wanted} left", f"#### {wanted}"):
            assert float(lm_eval_gsm8k(response)) == float(wanted)
            assert task.reward([response], [example]) == [1]


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ("It is now.", "no", 0), ("No, never.", "no", 1), ("I know.", "no", 0), ("no", "no", 1), ("(no)", "no", 1),
        ("He is in New\nYork.", "new york", 1), ("Newark, Yorkshire", "new york", 0), ("John's", "John", 1),
        ("I use C++ daily", "C++", 1), ("the U.S. army", "U.S.", 1), ("ASP.NET", ".NET", 1), ("$50", "$5", 0),
        ("15", "5", 0), ("3.5", "3", 0), ("3.5", "5", 0), ("1,000", "1", 0), ("-5", "5", 0), ("2-5", "5", 1),
        ("It is 5.", "5", 1), ("It is 3.5.", "3.5", 1), ("it costs $5", "5", 1), ("snake_case", "case", 0),
        ("我住在東京。", "東京", 1), ("答案是no吗", "no", 1), ("東京です", "東京", 1), ("파리는", "파리", 1),
        ("ที่กรุงเทพครับ", "กรุงเทพ", 1), ("STRASSE", "Straße", 1), ("cafe\u0301", "café", 1), ("cafe\u0301", "cafe", 0),
        ("Ångström", "ngstr", 0), ("It\u2019s fine", "it's fine", 1), ("", "no", 0),
    ],
)  # fmt: skip
def test_contains_matches_whole_words(text, gold, reward):
    assert make_reward("contains")([text], [gold]) == [reward]
