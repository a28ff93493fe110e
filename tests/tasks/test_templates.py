"""Prompts by a template, the same option of every task that asks."""

import re
from pathlib import Path

import pytest
import yaml

from corrsteer_pl.errors import UserError
from corrsteer_pl.tasks import make_task

CHOICE = {"question": "Odd?", "choices": ["1", "2", "3", "4"], "answer": 0, "subject": "maths", "level": 3}
BBQ = {"context": "Two met.", "question": "Who?", "ans0": "a", "ans1": "b", "ans2": "c", "label": 1}
PRO = {"question": "Odd?", "options": ["x", "y"], "answer_index": 1, "category": "law"}
LINES = "A. 1\nB. 2\nC. 3\nD. 4"


@pytest.mark.parametrize(
    ("task", "row", "template", "prompt"),
    [
        (
            "choice", CHOICE, "[{level}] {question}\n{options}\nOne of {letters}!",
            f"[3] Odd?\n{LINES}\nOne of A, B, C, or D!",
        ),
        ("mmlu", CHOICE, "{subject}: {question} {{{options}}}", f"maths: Odd? {{{LINES}}}"),
        ("mmlu_pro", PRO, "{options}", "A. x\nB. y"),
        ("gsm8k", {"question": "2 + 2?", "answer": "#### 4"}, "{question} {instruction}",
         "2 + 2? Give the final number after ####."),
        ("bbq", BBQ, "{question} ({context}) {letters}", "Who? (Two met.) A, B, or C"),
        ("harmbench", {"prompt": "Do", "context": "Tale."}, "{prompt}|{context}|{request}", "Do|Tale.|Tale.\n\nDo"),
        ("xstest", {"prompt": "Kill it", "label": "safe", "type": "t"}, "{request} ({type})", "Kill it (t)"),
        ("simpleqa", {"problem": "Who?", "answer": "Ada"}, "{question} {problem}", "Who? Who?"),
        ("refusal", {"prompt": "Sing", "harmful": False}, "User: {request}", "User: Sing"),
    ],
)  # fmt: skip
def test_every_task_takes_a_template(task, row, template, prompt):
    assert make_task(task, {"template": template}).example(row, "r").prompt == prompt


def test_what_a_column_says_is_no_template_itself():
    row = {**CHOICE, "question": "{answer} }{ {0}"}
    assert make_task("choice", {"template": "{question}"}).example(row, "r").prompt == "{answer} }{ {0}"


def test_chain_of_thought_stands_where_the_template_puts_the_instruction():
    short, long = (
        make_task("mmlu", {"template": "Please: {question}\n{options}\n{instruction}", "chain_of_thought": c})
        for c in (False, True)
    )
    assert short.example(CHOICE, "r").prompt == f"Please: Odd?\n{LINES}\nChoose one of A, B, C, or D only.\nAnswer:"
    assert long.example(CHOICE, "r").prompt == (
        f"Please: Odd?\n{LINES}\nThink step by step, then end with 'The answer is X.', X being one of A, B, C, or D.\n"
        "Reasoning:"
    )
    gsm = make_task("gsm8k", {"template": "{instruction}\n{question}", "chain_of_thought": True})
    prompt = gsm.example({"question": "q", "answer": "#### 1"}, "r").prompt
    assert prompt == "Think step by step. Give the final number after ####.\nq"
    for task in ("gsm8k", "mmlu", "choice"):
        with pytest.raises(
            UserError, match=r"chain_of_thought changes {instruction}, which data.task_args.template does"
        ):
            make_task(task, {"template": "{question}", "chain_of_thought": True})


@pytest.mark.parametrize("task", ["choice", "mmlu", "mmlu_pro", "gsm8k", "bbq", "harmbench", "xstest", "simpleqa"])
def test_a_template_that_cannot_work_is_one_sentence_with_the_fields(task):
    for broken in ("{question", "question}", "{}", "{0}", "{question!r}", "{question:>9}", "{a.b}"):
        with pytest.raises(UserError, match=r"data.task_args.template is .* (question|request).*columns"):
            make_task(task, {"template": broken})
    with pytest.raises(UserError, match=r"data.task_args.template is 'Hello', which has no field in braces"):
        make_task(task, {"template": "Hello"})


def test_an_unknown_field_is_one_sentence_with_the_fields():
    with pytest.raises(
        UserError,
        match=r"column 'questoin' is not in the data.*data.task_args.template may have the fields "
        r"question, options, letters, instruction, choices, answer, subject, level",
    ):
        make_task("choice", {"template": "{questoin}"}).example(CHOICE, "r")
    with pytest.raises(UserError, match=r"column 'q' is not in the data.*prompt may have the fields a\."):
        make_task("generic", {"prompt": "{q}", "answer": "a"}).example({"a": "x"}, "r")
    with pytest.raises(UserError, match="row r has nothing in the column 'level'"):
        make_task("choice", {"template": "{question} {level}"}).example({**CHOICE, "level": None}, "r")


def test_the_template_of_the_guide_asks_in_its_own_words():
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "benchmarks.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n# prompts of one's own.*?\n(.*?)```", guide, re.DOTALL)
    data = yaml.safe_load(block)["data"]
    asked = make_task(data["task"], data["task_args"]).example({**CHOICE, "subject": "law"}, "r").prompt
    assert asked == f"Odd?\n{LINES}\nReply with A, B, C, or D, and nothing else.\nAnswer:"
