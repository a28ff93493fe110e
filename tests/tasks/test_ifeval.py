import builtins
import json

import pytest

from corrsteer_pl.errors import UserError
from corrsteer_pl.files import read_rows
from corrsteer_pl.tasks import ifeval as room
from corrsteer_pl.tasks import make_task
from tests.conftest import SHARED

pytest.importorskip("lm_eval")
ROWS = SHARED / "data/ifeval/train.jsonl"
NONE = {"num_words": None, "relation": None, "forbidden_words": None, "end_phrase": None, "prompt_to_repeat": None}


def judged(text, *instructions, **options):
    names, given = zip(*instructions, strict=True)
    task = make_task("ifeval", options)
    row = {"prompt": "Write to me.", "instruction_id_list": list(names), "kwargs": [{**NONE, **some} for some in given]}
    example = task.example(row, "row 0")
    (reward,) = task.reward([text], [example])
    return reward


NO_COMMA = ("punctuation:no_comma", {})
LONG = ("length_constraints:number_words", {"relation": "at least", "num_words": 5})
WITHOUT = ("keywords:forbidden_words", {"forbidden_words": ["sea"]})
END = ("startend:end_checker", {"end_phrase": "Yours"})
REPEAT = ("combination:repeat_prompt", {"prompt_to_repeat": "Write to me."})
LOWER = ("change_case:english_lowercase", {})
HASH = ("keywords:letter_frequency", {"let_relation": "at least", "letter": "#", "let_frequency": 2})
SENTENCES = ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 3})


@pytest.mark.parametrize(
    ("text", "instructions", "share"),
    [
        ("One two three four five", [NO_COMMA, LONG], 1),
        ("One, two, three, four, five", [NO_COMMA, LONG], 0.5),
        ("One, two", [NO_COMMA, LONG], 0),
        ("", [NO_COMMA, WITHOUT], 0),
        ("The hills are high. Yours", [END, WITHOUT, NO_COMMA], 1),
        ("The sea is wide. Yours truly", [END, WITHOUT, NO_COMMA], 1 / 3),
        ("Write to me. I will.", [REPEAT], 1),
        ("I will.", [REPEAT], 0),
        ("all of this is quite small and plain", [LOWER], 1),
        ("All of this is Quite small and plain", [LOWER], 0),
        ("#one #two, nothing else", [HASH], 1),
        ("#one aaa bbb ccc ddd eee fff", [HASH], 0),
        ("It rains. We wait. Then we go.", [SENTENCES], 1),
        ("It rains and we wait, then we go.", [SENTENCES], 0),
    ],
)
def test_the_share_of_instructions_that_are_followed(text, instructions, share):
    assert judged(text, *instructions) == pytest.approx(share)
    assert judged(text, *instructions, all_or_nothing=True) == float(share == 1)


def test_kinds_are_groups_and_measures_count_prompts_and_instructions():
    task = make_task("ifeval", {})
    rows = [
        {"prompt": "a", "instruction_id_list": [NO_COMMA[0], LONG[0]], "kwargs": [{}, LONG[1]]},
        # As CSV has them.
        {"prompt": "b", "instruction_id_list": json.dumps([LONG[0]]), "kwargs": json.dumps([LONG[1]])},
    ]
    examples = [task.example(row, str(i)) for i, row in enumerate(rows)]
    assert [e.groups for e in examples] == [("length_constraints", "punctuation"), ("length_constraints",)]
    assert examples[0].prompt == "a"
    found = task.measures(["short", "one two three four five"], examples)
    assert found == {"prompt_level_strict": 0.5, "instruction_level_strict": pytest.approx(2 / 3)}
    assert set(task.measures([], []).values()) == {None}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a", "instruction_id_list": ["x:y"], "kwargs": []}, "as many kwargs as instructions"),
        ({"prompt": "a", "kwargs": [{}]}, "column 'instruction_id_list' is not in the data"),
    ],
)
def test_broken_rows_are_one_sentence(row, sentence):
    with pytest.raises(UserError, match=sentence):
        make_task("ifeval", {}).example(row, "row 0")


def test_an_unknown_instruction_is_named_with_its_neighbours():
    with pytest.raises(
        UserError, match="row 0 has the instruction 'punctuation:no_coma', which is none of punctuation:no_comma"
    ):
        judged("a", ("punctuation:no_coma", {}))


def test_without_the_extra_nothing_begins(monkeypatch):
    found = room.find_spec
    monkeypatch.setattr(room, "find_spec", lambda name: None if name == "langdetect" else found(name))
    with pytest.raises(UserError, match=r"needs the package langdetect.*pip install 'corrsteer_pl\[ifeval\]'"):
        make_task("ifeval", {})


def test_abbreviations_end_no_sentence():
    text = "Mr. Smith of Acme Corp. met Gen. Jones vs. the rest. They left."
    fewer = "length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}
    more = "length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}
    assert judged(text, fewer, more) == 1


def test_making_the_task_imports_no_checker(monkeypatch):
    real = builtins.__import__

    def watched(name, *args, **kwargs):
        assert not name.startswith("lm_eval")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", watched)
    make_task("ifeval", {})


@pytest.mark.skipif(not ROWS.exists(), reason="the IFEval rows are absent")
def test_real_rows_are_judged_as_lm_eval_judges_them():
    room.checkers()
    from lm_eval.tasks.ifeval import utils

    # In the others lm-eval counts a letter at random.
    rows = [row for row in read_rows(ROWS) if all(some.get("letter", "a").isalpha() for some in row["kwargs"])]
    task = make_task("ifeval", {})
    assert 535 <= len(rows) < 541
    examples = [task.example(row, str(i)) for i, row in enumerate(rows)]
    assert set(task.reward([""] * len(rows), examples)) == {0.0}
    texts = [f"<<{row['prompt'][:300]}>>\n\n* one, two\n* THREE. P.S. four" for row in rows]
    expected = []
    for row, text in zip(rows, texts, strict=True):
        given = utils.InputExample(row["key"], row["instruction_id_list"], row["prompt"], row["kwargs"])
        verdicts = utils.test_instruction_following_strict(given, text).follow_instruction_list
        expected.append(sum(verdicts) / len(verdicts))
    found = task.reward(texts, examples)
    assert found == expected
    assert 0.1 < sum(found) / len(found) < 0.9
    assert task.reward(texts, examples) == found, "languages are detected the same every time"
