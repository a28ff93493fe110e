"""Prompts, gold answers and rewards on real benchmark rows, recomputed here by other means."""

import re
from collections import Counter

import pytest

from corrsteer_pl import TaskDataModule
from corrsteer_pl.files import read_rows
from corrsteer_pl.tasks import make_task
from tests.conftest import SHARED

DATA = SHARED / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no real rows on this machine")


def rows_of(name):
    return read_rows(DATA / name)


def examples_of(task, rows, **options):
    made = make_task(task, options)
    return made, [made.example(row, str(i)) for i, row in enumerate(rows)]


@pytest.mark.parametrize("split", ["test", "validation", "dev"])
def test_mmlu(split):
    rows = rows_of(f"mmlu/{split}.jsonl")
    task, examples = examples_of("mmlu", rows)
    for row, example in zip(rows, examples, strict=True):
        a, b, c, d = row["choices"]
        assert example.prompt == (
            f"{row['question']}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nChoose one of A, B, C, or D only.\nAnswer:"
        )
        assert example.gold == chr(ord("A") + row["answer"])
        assert example.groups == (row["subject"],)
    assert task.reward([f" {e.gold}" for e in examples], examples) == [1] * len(rows)
    assert task.reward([" E"] * len(rows), examples) == [0] * len(rows)


def test_mmlu_pro_letters_are_those_of_the_rows():
    rows = rows_of("mmlu_pro/test.jsonl")
    _, examples = examples_of("mmlu_pro", rows)
    assert [example.gold for example in examples] == [row["answer"] for row in rows]
    for row, example in zip(rows, examples, strict=True):
        shown = re.findall(r"^([A-J])\. ", example.prompt[len(row["question"]) :], re.MULTILINE)
        assert "".join(shown).startswith("ABCDEFGHIJ"[: len(row["options"])])


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_numbers_are_those_after_the_marks(split):
    rows = rows_of(f"gsm8k/{split}.jsonl")
    task, examples = examples_of("gsm8k", rows)
    for row, example in zip(rows, examples, strict=True):
        assert float(example.gold) == float(row["answer"].split("####")[1].replace(",", ""))
        assert example.prompt == f"Q: {row['question']}\nGive the final number after ####.\nA:"
    assert task.reward([row["answer"] for row in rows], examples) == [1] * len(rows)
    # Without marks, the last number of a worked solution is mostly not its answer's: the marks matter.
    assert task.reward([f"#### {float(e.gold) + 1:.1f}" for e in examples], examples) == [0] * len(rows)


def test_bbq_labels_and_stereotyped_persons():
    for category in ("Age", "Religion", "Sexual_orientation"):
        rows = rows_of(f"bbq/{category}.test.jsonl")
        task, examples = examples_of("bbq", rows)
        known = Counter()
        for row, example in zip(rows, examples, strict=True):
            assert example.gold == "ABC"[row["label"]]
            assert example.groups == (category, row["context_condition"], row["question_polarity"])
            unknown = [i for i in range(3) if row["answer_info"][f"ans{i}"][1] == "unknown"]
            if row["context_condition"] == "ambig":
                assert unknown == [row["label"]]
            if "biased" in example.details:
                known[row["question_polarity"]] += 1
                letters = {example.details["biased"], example.details["counter"], "ABC"[unknown[0]]}
                assert letters == set("ABC")
        assert known["neg"] == known["nonneg"] == len(rows) / 2, category
        measures = task.measures([f" {e.details.get('biased', e.gold)}" for e in examples], examples)
        assert measures["bias_score_ambig"] == 1
        assert measures["bias_score_disambig"] == 1


def test_safety_rows():
    rows = rows_of("xstest/test.jsonl")
    task, examples = examples_of("xstest", rows, judge="prefixes")
    assert Counter(example.gold for example in examples) == {"comply": 250, "refuse": 200}
    assert task.reward(["I cannot."] * 450, examples) == [float(row["label"] == "unsafe") for row in rows]
    rows = rows_of("harmbench/standard.train.jsonl")
    task, examples = examples_of("harmbench", rows, judge="prefixes")
    assert all(
        example.gold == "refuse" and example.groups == (r["category"],)
        for example, r in zip(examples, rows, strict=True)
    )
    assert task.reward(["Sure."] * 200, examples) == [0] * 200


def test_simpleqa_topics_and_answers():
    rows = rows_of("simpleqa/test.jsonl")
    task, examples = examples_of("simpleqa", rows, judge="match")
    assert len({example.groups for example in examples}) == 10
    assert task.reward([f" {row['answer']}." for row in rows], examples) == [1] * len(rows)
    one_line = [i for i, row in enumerate(rows) if "\n" not in row["answer"]]
    said = [f" the {rows[i]['answer']}\nQuestion: next" for i in one_line]
    assert task.reward(said, [examples[i] for i in one_line]) == [1] * len(one_line)


def test_stereoset_has_a_text_of_each_label_in_every_row():
    rows = rows_of("stereoset/intrasentence.validation.jsonl")
    options = {"text": "sentences.sentence", "label": "sentences.gold_label", "positive": [1], "negative": [0]}
    task = make_task("text_classification", options)
    texts = [task.examples(row, str(i)) for i, row in enumerate(rows)]
    assert all(sorted(example.gold for example in some) == ["negative", "positive"] for some in texts)
    (caring,) = [e for some in texts for e in some if e.prompt == "A mother is caring."]
    assert caring.gold == "negative"


@pytest.mark.parametrize(
    ("task", "path", "options", "sizes"),
    [
        ("mmlu", "mmlu", {}, None),
        ("mmlu_pro", "mmlu_pro", {}, None),
        ("gsm8k", "gsm8k", {}, None),
        ("bbq", "bbq", {"filter": {"context_condition": "ambig", "category": ["Age", "Religion"]}}, None),
        ("harmbench", "harmbench", {}, [54, 6, 140]),
        ("xstest", "xstest", {}, [121, 14, 315]),
        ("simpleqa", "simpleqa", {}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:.* prompts are .* prompts too")
def test_folders_in_the_hubs_columns_replace_the_hub(task, path, options, sizes):
    data = TaskDataModule(task, str(DATA / path), **options)
    data.setup("fit")
    splits = {name: {e.prompt for e in examples} for name, examples in data.examples.items()}
    assert set(splits) == {"train", "validation", "test"}
    assert not splits["train"] & splits["validation"] | splits["train"] & splits["test"]
    if sizes:
        assert [len(data.examples[name]) for name in ("train", "validation", "test")] == sizes
    if options:
        assert {e.groups[1] for e in data.examples["test"]} == {"ambig"}
        assert {e.groups[0] for e in data.examples["test"]} == {"Age", "Religion"}
