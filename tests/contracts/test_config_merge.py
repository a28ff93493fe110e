"""Contract: several configurations merge as one dictionary, later values over earlier ones."""

import json

import pytest
import yaml

from corrsteer_pl import TaskDataModule
from corrsteer_pl.cli.arguments import with_whole_dicts
from corrsteer_pl.cli.program import main
from corrsteer_pl.files import write_jsonl


@pytest.fixture
def config(tmp_path):
    def write(name, settings):
        (tmp_path / name).write_text(yaml.safe_dump(settings), encoding="utf-8")
        return str(tmp_path / name)

    return write


def printed(capsys, *args):
    """The options that a fit would have, as its parser prints them."""
    with pytest.raises(SystemExit) as end:
        main(["fit", *args, "--print_config"])
    assert not end.value.code
    return yaml.safe_load(capsys.readouterr().out)


AMBIGUOUS = {"data": {"task": "bbq", "filter": {"context_condition": "ambig"}}}


def test_a_second_configuration_keeps_the_filter_of_the_first(config, capsys):
    args = ["--config", "bbq_ambig.yaml", "--config", config("age.yaml", {"data": {"filter": {"category": ["Age"]}}})]
    wanted = {"context_condition": "ambig", "category": ["Age"]}
    assert printed(capsys, *args)["data"]["filter"] == wanted
    by_hand = printed(capsys, *args[:2], "--data.filter.category", "[Age]")["data"]["filter"]
    assert by_hand == wanted


@pytest.mark.parametrize(
    ("configurations", "wanted"),
    [
        # Lists and values are replaced, null too, other names stay.
        ([{"filter": {"a": [1, 2], "b": 1}}, {"filter": {"a": [3]}}], {"filter": {"a": [3], "b": 1}}),
        ([{"filter": {"a": 1, "b": 1}}, {"filter": {"a": None}}], {"filter": {"a": None, "b": 1}}),
        ([{"filter": {"a": 1}}, {"filter": None}, {"filter": {"b": 2}}], {"filter": {"b": 2}}),
        # At every depth, and of more than two.
        (
            [{"task_args": {"u": {"a": [1]}}}, {"task_args": {"u": {"b": [2]}}}, {"task_args": {"v": "5"}}],
            {"task_args": {"u": {"a": [1], "b": [2]}, "v": "5"}},
        ),
        (
            [{"fit_on": {"task": "mmlu", "filter": {"a": 1}}}, {"fit_on": {"filter": {"b": 2}, "path": ["x"]}}],
            {"fit_on": {"task": "mmlu", "filter": {"a": 1, "b": 2}, "path": ["x"]}},
        ),
        # Settings of another task do not apply.
        (
            [{"fit_on": {"task": "mmlu", "filter": {"a": 1}}}, {"fit_on": {"task": "bbq", "filter": {"b": 2}}}],
            {"fit_on": {"task": "bbq", "filter": {"b": 2}}},
        ),
        (
            [{"task": "mmlu", "task_args": {"a": 1}}, {"task": "bbq", "task_args": {"b": 2}}],
            {"task": "bbq", "task_args": {"b": 2}},
        ),
        (
            [{"task": "mmlu", "task_args": {"a": 1}}, {"task": "mmlu", "task_args": {"b": 2}}],
            {"task_args": {"a": 1, "b": 2}},
        ),
    ],
)
def test_dictionaries_merge_and_other_values_replace(configurations, wanted, config, capsys):
    paths = [config(f"{i}.yaml", {"data": data}) for i, data in enumerate(configurations)]
    found = printed(capsys, *(argument for path in paths for argument in ("--config", path)))["data"]
    assert {name: found[name] for name in wanted} == wanted


def test_the_command_line_prevails_in_any_order(config, capsys):
    first, second = config("a.yaml", AMBIGUOUS), config("b.yaml", {"data": {"filter": {"x": 1, "y": 1}}})
    found = printed(capsys, "--data.filter.y", "2", f"--config={first}", "--config", second)["data"]["filter"]
    assert found == {"context_condition": "ambig", "x": 1, "y": 2}


def test_options_of_the_model_merge_too(config, capsys):
    paths = [config(f"{i}.yaml", {"model": {"llm_args": {name: i}}}) for i, name in enumerate("ab")]
    found = printed(capsys, *(argument for path in paths for argument in ("--config", path)))
    assert found["model"]["llm_args"] == {"a": 0, "b": 1}
    other = config("other.yaml", {"model": {"llm": "another/model", "llm_args": {"c": 2}}})
    base = config("base.yaml", {"model": {"llm": "a/model", "llm_args": {"trust_remote_code": True}}})
    assert printed(capsys, "--config", base, "--config", other)["model"]["llm_args"] == {"c": 2}


def test_a_part_in_a_file_of_its_own_merges(config):
    config("data.yaml", {"filter": {"a": 1}})
    whole, more = config("whole.yaml", {"data": "data.yaml"}), config("more.yaml", {"data": {"filter": {"b": 2}}})
    last = with_whole_dicts(["fit", "--config", whole, "--config", more])[-1]
    assert json.loads(last.removeprefix("--data.filter=")) == {"a": 1, "b": 2}


def test_a_checkpoint_is_below_configurations_and_these_below_the_command_line(config):
    stored = json.dumps({"data": {"filter": {"a": 0, "b": 0, "c": 0}}})
    later = config("later.yaml", {"data": {"filter": {"b": 1, "c": 1}}})
    last = with_whole_dicts(["test", "--config", stored, "--config", later, "--data.filter.c", "2"])[-1]
    assert json.loads(last.removeprefix("--data.filter=")) == {"a": 0, "b": 1, "c": 2}


def test_a_single_configuration_is_left_to_the_parser(config):
    args = ["fit", "--config", config("one.yaml", AMBIGUOUS)]
    assert with_whole_dicts(args) == args


def test_merged_configurations_select_the_rows_of_both(config, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f"{i}", "a": "x", "kind": i % 2, "part": i % 3} for i in range(60)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    base = {
        "task": "generic",
        "path": str(tmp_path / "rows.jsonl"),
        "task_args": {"answer": "a"},
        "filter": {"kind": 1},
    }
    args = [
        "--config",
        config("a.yaml", {"data": base}),
        "--config",
        config("b.yaml", {"data": {"filter": {"part": 2}}}),
    ]
    options = printed(capsys, *args)["data"]
    data = TaskDataModule(**options)
    data.setup("fit")
    data.setup("test")
    kept = {e.prompt for some in data.rows.examples(("train", "validation", "test"), 0).values() for e in some}
    assert kept == {str(i) for i in range(60) if i % 2 == 1 and i % 3 == 2}
