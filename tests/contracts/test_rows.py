"""Contract: rows have unique ids and no missing values, and options name values that occur."""

import json

import numpy as np
import pandas
import pytest

from corrsteer_pl import Example, Task, TaskDataModule
from corrsteer_pl.data.splits import SPLITS
from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.paired import Outcome, outcome_rows
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.tasks import make_task

QUESTION = {"question": "q", "choices": ["a", "b"], "answer": 0}


def generic(path, **options):
    return TaskDataModule(**{"task": "generic", "path": str(path), "task_args": {"answer": "a"}, **options})


def everything(data):
    return [example for examples in data.rows.examples(SPLITS, 0).values() for example in examples]


def shared(pattern="share their id"):
    return pytest.warns(UserWarning, match=pattern)


def test_subset_files_that_both_count_from_0_have_ids_of_their_own(tmp_path):
    for name in ("A", "B"):
        write_jsonl(tmp_path / f"{name}.test.jsonl", [{"id": i, "prompt": f"{name}{i}", "a": "x"} for i in range(60)])
    ids = []
    for options in ({}, {"seed": 5, "batch_size": 7}):
        data = generic(tmp_path, **options)
        with shared("120 of 120 rows share their id with another, such as '0'"):
            data.setup("test")
        ids.append({example.prompt: example.id for example in data.examples["test"]})
    assert len(set(ids[0].values())) == 120
    assert ids[0] == ids[1]
    for options in ({"filter": {"subset": "B"}}, {"balance": "subset"}):
        data = generic(tmp_path, **options)
        with shared():
            data.setup("test")
        assert {example.prompt: example.id for example in data.examples["test"]}.items() <= ids[0].items()


@pytest.mark.parametrize(
    "ids", [[1, "1"], [1.0, 1], ["", None], [float("nan"), None], ["r:1", None], ["x", "x"], [[1], [1]]]
)
def test_ids_are_unique_whatever_their_type(ids, tmp_path):
    rows = [{"id": id, "prompt": f"p{i}", "a": "x"} for i, id in enumerate([*ids, "other", "another"])]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = generic(tmp_path / "r.jsonl", train_split="all")
    if ids in (["", None], [float("nan"), None]) or any(id != id for id in ids):
        found = everything(data)
    else:
        with shared():
            found = everything(data)
    assert len({example.id for example in found}) == 4
    assert {"other", "another"} <= {example.id for example in found}
    assert not {example.id for example in found} & {"nan", "None", ""}


class Constant(Task):
    max_new_tokens = 1

    def example(self, row, id):
        return Example("same", row["prompt"], "x")


class Halves(Constant):
    def examples(self, row, id):
        return [Example(id, f"{row['prompt']} {half}", "x") for half in "ab"]


@pytest.mark.parametrize(("task", "count"), [(Constant, 10), (Halves, 20)])
def test_examples_of_a_users_own_task_have_unique_ids(task, count, tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [{"prompt": f"p{i}"} for i in range(10)])
    data = TaskDataModule(f"{__name__}.{task.__name__}", str(tmp_path / "r.jsonl"))
    with shared():
        assert len({example.id for example in everything(data)}) == count


MISSING = (None, float("nan"), "", " \t", "\u00a0")


@pytest.mark.parametrize("value", MISSING)
@pytest.mark.parametrize(
    ("task", "row", "name", "options"),
    [
        ("choice", QUESTION, "question", {}),
        ("choice", QUESTION, "answer", {}),
        ("choice", QUESTION, "choices", {}),
        ("choice", {**QUESTION, "g": "x"}, "g", {"group": "g"}),
        ("choice", {**QUESTION, "g": "x"}, "g", {"unlearn": {"g": ["x"]}}),
        ("generic", {"prompt": "p", "a": "x"}, "a", {"answer": "a"}),
        ("generic", {"prompt": "p", "a": "x"}, "prompt", {"answer": "a"}),
        ("gsm8k", {"question": "q", "answer": "#### 3"}, "answer", {}),
        ("simpleqa", {"problem": "q", "answer": "x"}, "answer", {"judge": "match"}),
        ("xstest", {"prompt": "p", "label": "safe"}, "label", {"judge": "prefixes"}),
        ("xstest", {"prompt": "p", "label": "safe", "type": "t"}, "type", {"judge": "prefixes"}),
        ("harmbench", {"prompt": "p", "category": "c"}, "category", {"judge": "prefixes"}),
        ("refusal", {"prompt": "p", "harmful": True}, "harmful", {}),
        ("text_classification", {"text": "t", "label": 1}, "label", {}),
        ("text_classification", {"text": "t", "label": 1}, "text", {}),
        ("bbq", {"context": "c", "question": "q", "ans0": "a", "ans1": "b", "ans2": "c", "label": 1}, "ans2", {}),
        (
            "bbq",
            {"context": "c", "question": "q", "ans0": "a", "ans1": "b", "ans2": "c", "label": 1, "category": "Age"},
            "category", {},
        ),
    ],
)  # fmt: skip
def test_a_missing_value_is_reported_with_file_and_line_or_dropped(value, task, row, name, options, tmp_path):
    numbered = [{key: f"{v}{i}" if key in ("question", "prompt", "text", "problem") else v for key, v in row.items()}
                for i in range(20)]  # fmt: skip
    if isinstance(value, str) and name in ("g", "type", "category") and "unlearn" not in options:
        pytest.skip("empty text is no group")
    for i in (3, 7):
        numbered[i] = {**numbered[i], name: value}
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbered))
    named = {"task": task, "path": str(tmp_path / "r.jsonl"), "task_args": options, "train_split": "all"}
    named |= {"val_split": "all", "test_split": "all"}
    with pytest.raises(UserError, match=f"2 of 20 rows .*'{name}' .*line 4, r.jsonl, line 8.*data.on_missing"):
        everything(TaskDataModule(**named))
    with pytest.warns(UserWarning, match="2 of 20 rows .*left out"):
        found = everything(TaskDataModule(**named, on_missing="drop"))
    whole = {e.id for e in found}
    assert whole == {f"r:{i}" for i in range(20) if i not in (3, 7)}
    assert not any(text in ("None", "nan", "") for e in found for text in (e.prompt, *e.groups))


def test_empty_text_is_no_group_and_no_error(tmp_path):
    # The fit split of cais/mmlu has an empty subject in every row.
    write_jsonl(tmp_path / "r.jsonl", [{**QUESTION, "question": f"q{i}", "subject": ""} for i in range(10)])
    found = everything(TaskDataModule("mmlu", str(tmp_path / "r.jsonl"), train_split="all"))
    assert [example.groups for example in found] == [()] * 10


def test_trailing_null_options_are_removed_and_inner_ones_reported():
    task = make_task("choice", {"options": 5})
    for missing in (None, float("nan"), ""):
        example = task.example({**QUESTION, "choices": ["a", "b", "c", "d", missing]}, "r")
        assert "D. d" in example.prompt
        assert "E." not in example.prompt
        with pytest.raises(UserError, match="row r has nothing in the column 'choices'"):
            task.example({**QUESTION, "choices": ["a", missing, "c"]}, "r")
    with pytest.raises(UserError, match="none of its options"):
        task.example({**QUESTION, "choices": ["a", "b", None], "answer": 2}, "r")


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_integers_that_pandas_made_floats_are_integers(form, tmp_path):
    table = pandas.DataFrame({"prompt": [f"p{i}" for i in range(10)], "a": [*map(float, range(9)), np.nan]})
    path = tmp_path / f"r.{form}"
    {
        "parquet": table.to_parquet,
        "csv": lambda path: table.to_csv(path, index=False),
        "jsonl": lambda path: table.to_json(path, orient="records", lines=True),
    }[form](path)
    with pytest.raises(UserError, match="1 of 10 rows have nothing in the column 'a'"):
        everything(generic(path))
    with pytest.warns(UserWarning, match="1 of 10 rows"):
        found = everything(generic(path, on_missing="drop"))
    assert {e.gold for e in found} == {str(i) for i in range(9)}


def test_an_index_may_be_a_float():
    for answer in (1.0, "1.0", np.float64(1)):
        assert make_task("choice", {}).example({**QUESTION, "answer": answer}, "r").gold == "B"
    row = {"context": "c", "question": "q", "ans0": "a", "ans1": "b", "ans2": "c", "label": 2.0}
    assert make_task("bbq", {}).example(row, "r").gold == "C"


def test_valid_values_are_left_as_they_are(tmp_path):
    (tmp_path / "r.csv").write_text(
        "prompt,a\n" + "".join(f"p{i},{a}\n" for i, a in enumerate(["None", "NA", "null", "2.0"]))
    )
    assert {e.gold for e in everything(generic(tmp_path / "r.csv"))} == {"None", "NA", "null", "2.0"}
    # A field of several may be empty text, as the inputs of instruction data are.
    rows = [{"prompt": f"p{i}", "input": "", "a": 2.0} for i in range(10)]
    write_jsonl(tmp_path / "r.jsonl", rows)
    data = generic(tmp_path / "r.jsonl", task_args={"answer": "a", "prompt": "{prompt} {input}"})
    assert {e.gold for e in everything(data)} == {"2.0"}


def test_a_fit_on_other_rows_inherits_what_becomes_of_missing_values(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [{"text": f"t{i}", "label": None if i == 2 else i % 2} for i in range(10)])
    fit_on = {"task": "text_classification", "path": str(tmp_path / "r.jsonl")}
    with pytest.raises(UserError, match="1 of 10 rows have nothing in the column 'label'"):
        TaskDataModule(fit_on=fit_on, val_size=4).setup("fit")
    for options in ({"on_missing": "drop", "fit_on": fit_on}, {"fit_on": {**fit_on, "on_missing": "drop"}}):
        data = TaskDataModule(**options, val_size=4)
        with pytest.warns(UserWarning, match="1 of 10 rows"):
            data.setup("fit")
        assert len(data.examples["train"]) == 9


@pytest.mark.parametrize(
    ("task", "options", "option"),
    [
        ("choice", {"unlearn": {"hazard": [True]}}, "unlearn"),
        ("choice", {"unlearn": {"hazard": ["yess"]}}, "unlearn"),
        ("text_classification", {"text": "question", "label": "hazard", "positive": [True]}, "positive"),
        (
            "text_classification",
            {"text": "question", "label": "hazard", "positive": ["yes"], "negative": [0]},
            "negative",
        ),
    ],
)
def test_values_that_occur_in_no_row_are_rejected(task, options, option, tmp_path):
    rows = [{**QUESTION, "question": f"q{i}", "hazard": "yes" if i % 2 else "no"} for i in range(20)]
    write_jsonl(tmp_path / "r.jsonl", rows)
    with pytest.raises(UserError, match=f"data.task_args.{option} .*'no', 'yes'") as error:
        everything(TaskDataModule(task, str(tmp_path / "r.jsonl"), options))
    given = next(iter(options["unlearn"].values()))[0] if option == "unlearn" else options[option][0]
    assert ("quotes" in str(error.value)) is not isinstance(given, str)
    with pytest.raises(UserError, match="data.filter wants hazard 'True'.*'no', 'yes'.*quotes"):
        everything(TaskDataModule("choice", str(tmp_path / "r.jsonl"), filter={"hazard": True}))


def test_a_balance_counts_all_data_sets_together(tmp_path):
    for name, count in (("small", 30), ("large", 75)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(count)])
    fit_on = {
        "task": "text_classification", "path": [str(tmp_path / f"{name}.jsonl") for name in ("small", "large")],
        "task_args": {"label": "source", "positive": ["small"]},
    }  # fmt: skip

    def sources(**options):
        data = TaskDataModule(fit_on={**fit_on, **options}, val_size=4)
        data.setup("fit")
        names = [example.prompt.split()[0] for example in data.examples["train"]]
        return names.count("small"), names.count("large")

    assert sources() == (30, 75)
    assert sources(balance="source") == (30, 30)
    with pytest.raises(UserError, match="all 75 texts"):
        sources(filter={"source": ["large"]}, task_args={"label": "source", "positive": ["large"]})


def test_outcomes_that_share_an_id_are_rejected(tmp_path):
    outcome = Outcome("0", "p", "g", (), "a", "b", 0.0, 1.0)
    write_jsonl(tmp_path / "outcomes.jsonl", [vars(outcome), {**vars(outcome), "id": "1"}])
    assert [row["id"] for row in outcome_rows(tmp_path / "outcomes.jsonl")] == ["0", "1"]
    write_jsonl(tmp_path / "outcomes.jsonl", [vars(outcome), vars(outcome)])
    with pytest.raises(UserError, match="outcomes.jsonl .*'0'"):
        outcome_rows(tmp_path / "outcomes.jsonl")
