"""What a user gives, and which of it prevails."""

import json
from pathlib import Path

import pytest
import yaml

from corrsteer_pl.cli.arguments import given_options, with_whole_dicts
from corrsteer_pl.cli.program import main
from corrsteer_pl.cli.tags import tag
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import read_rows, write_jsonl
from corrsteer_pl.options import check_options
from corrsteer_pl.rewards import reward
from tests.conftest import make_trainer

QUIET = ["--trainer.enable_progress_bar=false"]


def test_options_are_seen_however_they_are_spelt(tmp_path):
    (tmp_path / "model.yaml").write_text("scale: 3\nllm_args: {revision: x}\n", encoding="utf-8")
    (tmp_path / "data.yaml").write_text("task: demo_refusal\n", encoding="utf-8")
    args = ["fit", "--model", str(tmp_path / "model.yaml"), f"--data={tmp_path / 'data.yaml'}", "--model.layers+=2"]
    args += ["--data.path=", "--model.sign", "both", '--trainer={"default_root_dir": "here"}', "--print_config"]
    args += ["--data.filter", "{a: {b: 1}}", "--model.llm_args.attn_implementation=eager"]
    assert given_options(args) == {
        "model.scale": 3,
        "model.llm_args.revision": "x",
        "model.llm_args.attn_implementation": "eager",
        "model.layers": "2",
        "model.sign": "both",
        "data.task": "demo_refusal",
        "data.path": "",
        "data.filter.a.b": 1,
        "trainer.default_root_dir": "here",
    }


def test_commands_that_are_no_stage_have_options_of_their_own(tmp_path, capsys):
    assert given_options(["train_saes", "--data", "rows.jsonl", "--k=3"]) == {"data": "rows.jsonl", "k": "3"}
    assert main(["train_saes", "--llm", "demo", "--data", str(tmp_path / "none.jsonl"), "--out", "x"]) == 2
    assert "none.jsonl cannot be read (No such file or directory)" in capsys.readouterr().err


def test_results_are_named_after_all_that_differs_however_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--data.train_size=96", "--data.val_size=16", "--data.test_size=20", "--model.layers=[1]", *QUIET]
    assert main(["fit", "--config", "demo.yaml", *small]) == 0
    Path("model.yaml").write_text("scale: 3\n", encoding="utf-8")
    Path("data.yaml").write_text("test_size: 5\n", encoding="utf-8")
    test = ["test", "--ckpt_path", "checkpoints/demo/last.ckpt", *QUIET]
    assert main([*test, "--model", "model.yaml"]) == 0
    assert main([*test, "--data", "data.yaml", '--model={"scale": 1.0}']) == 0
    assert main([*test, "--trainer.limit_test_batches=1", "--data.batch_size=4"]) == 0
    assert main([*test, "--data.filter", "{subject: age}"]) in (0, 2)
    tests = {path.name for path in Path("checkpoints/demo/test").iterdir()}
    assert {"demo_qa-scale-3", "demo_qa-test_size-5", "demo_qa-limit_test_batches-1"} <= tests
    assert "demo_qa" not in tests


def test_long_names_are_cut_and_stay_different():
    options = [f"model.{'x' * 20}{i}" for i in range(12)]
    ours, others = ({"model": {o.removeprefix("model."): v for o in options}} for v in ("a" * 30, "b" * 30))
    one, other = tag(ours, {}, options), tag(others, {}, options)
    assert max(len(one.encode()), len(other.encode())) <= 160
    assert one != other
    assert tag(ours, ours, options) is None


def test_options_by_name_are_put_together_and_parsed_once(tmp_path):
    (tmp_path / "c.yaml").write_text('data:\n  task_args: {prompt: "Q: {q}\\nA:", gold: "yes", n: 1}\n')
    (tmp_path / "d.yaml").write_text("data:\n  filter: {a: b}\n")
    args = [
        "fit",
        "--config",
        str(tmp_path / "c.yaml"),
        "--config",
        str(tmp_path / "d.yaml"),
        "--data.task_args.n",
        "2",
    ]
    *others, whole = with_whole_dicts([*args, "--data.task_args.s='5'", "--data.seed", "3"])
    assert others == [*args[:5], "--data.seed", "3"]
    assert whole.startswith("--data.task_args=")
    assert json.loads(whole.partition("=")[2]) == {"prompt": "Q: {q}\nA:", "gold": "yes", "n": 2, "s": "5"}
    replaced = with_whole_dicts([*args[:3], '--data.task_args={"gold": "no"}', "--data.task_args.x.y=true"])[-1]
    assert json.loads(replaced.partition("=")[2]) == {"gold": "no", "x": {"y": True}}


@pytest.mark.parametrize("gold", ["yes", "5", "007", "null", "a: b", "[1]"])
def test_quoted_text_stays_text_from_configuration_to_checkpoint(gold, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"Request: sing {i} songs", "a": gold} for i in range(80)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {
        "prompt": "{q}: now\nResponse:",
        "gold": gold,
        "reward": "tests.cli.test_arguments.half",
        "max_new_tokens": 2,
    }
    settings = {"model": {"llm": "demo", "saes": "demo", "layers": [1], "rule": "all", "check_alignment": "off"}}
    settings["data"] = {"task": "generic", "path": "rows.jsonl", "task_args": options, "filter": {"a": gold}}
    Path("own.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", "own.yaml", *QUIET]) == 0
    # A checkpoint runs no code that the user does not name anew.
    test = ["test", "--ckpt_path", "checkpoints/own/last.ckpt", *QUIET]
    assert main(test) == 2
    reward = "--data.task_args.reward tests.cli.test_arguments.half"
    assert f"sets {reward.split()[0][2:]} to {reward.split()[1]}, which runs code" in capsys.readouterr().err
    # Nor is any run if the user names something else instead.
    assert main([*test, "--data.task_args.reward", "exact"]) == 0
    assert main([*test, *reward.split()]) == 0
    for line in read_rows(Path("checkpoints/own/test/generic/outcomes.jsonl")):
        assert line["gold"] == gold
        assert line["prompt"].endswith(": now\nResponse:")
    assert json.loads(Path("checkpoints/own/test/generic/metrics.json").read_text())["task_args"] == options


@reward
def half(text, gold):
    """Rewards that differ, whatever is said."""
    half.calls = getattr(half, "calls", 0) + 1
    return float(half.calls % 2)


def test_results_of_other_settings_stand_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--data.train_size=96", "--data.val_size=16", "--data.test_size=20", "--model.layers=[1]", *QUIET]
    assert main(["fit", "--config", "demo.yaml", *small]) == 0
    test = ["test", "--ckpt_path", "checkpoints/demo/last.ckpt", *QUIET]
    assert main(test) == 0
    assert main([*test, "--data.test_size", "7"]) == 0
    assert main([*test, "--data.filter", "{answer: 0}", "--model.scale=2"]) == 0
    assert main([*test, "--data.seed=1"]) == 0
    assert main([*test, "--trainer.limit_test_batches=1", "--model.llm_args={attn_implementation: eager}"]) == 0
    assert main([*test, "--model.scale=1", "--data.restrict=False"]) == 0
    folders = {path.name for path in Path("checkpoints/demo/test").iterdir()}
    other = {"demo_qa-test_size-7", "demo_qa-scale-2-filter.answer-0", "demo_qa-seed-1"}
    assert folders == {"demo_qa", *other, "demo_qa-llm_args.attn_implementation-eager-limit_test_batches-1"}
    written = Path("checkpoints/demo/test/demo_qa/metrics.json")
    assert json.loads(written.read_text())["n"] == 20
    before = written.read_bytes()
    assert main([*test, "--trainer.fast_dev_run=true"]) == 0
    assert written.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"group": 3}, "data.task_args.group is 3; it takes str or nothing"),
        ({"question": None}, "data.task_args.question is None; it takes str"),
        ({"options": 4.0}, "data.task_args.options is 4.0; it takes int"),
        ({"shuffle": "yes"}, "data.task_args.shuffle is 'yes'; it takes true or false"),
    ],
)
def test_options_of_another_kind_are_refused(options, sentence):
    from corrsteer_pl.tasks import make_task

    with pytest.raises(UserError, match=sentence):
        make_task("choice", options)


def test_numbers_and_lists_are_told_apart():
    def function(share: float, names: list[str] | None = None, free=None): ...

    check_options(function, {"share": 1, "names": ["a"], "free": object()}, "x")
    for options in ({"share": True}, {"share": "1"}, {"names": "a"}):
        with pytest.raises(UserError, match=r"x\.\w+ is .*; it takes"):
            check_options(function, options, "x")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["fitt"],
            "the command 'fitt' is not known; choose one of fit, validate, test, predict, transfer, compare, doctor, "
            "report, ",
        ),
        (["fit", "--config", "x" * 300], "was found neither as given nor in configs/"),
        (["fit", "--config", "demo.yaml", "--data.path", "x" * 300], "which does not exist"),
        (["fit", "--config", "demo.yaml", "--data.seed", "9" * 20], "it is a whole number from 0 to"),
        (["fit", "--config", "demo.yaml", "--data.shots", "-1"], "data.shots is -1; it is a number of examples"),
    ],
)
def test_absurd_values_are_one_sentence(args, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    assert sentence in capsys.readouterr().err


def test_what_looks_like_markup_is_shown_as_it_is(tmp_path, monkeypatch, capsys):
    from corrsteer_pl import CorrSteer, TaskDataModule
    from corrsteer_pl.evaluation.tables import metrics_table, show

    rows = [{"prompt": f"Request: sing {i}", "a": "Sure", "g": "[/x] :train:"} for i in range(60)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {"answer": "a", "reward": "tests.cli.test_arguments.half", "group": "g", "max_new_tokens": 2}
    data = TaskDataModule("generic", str(tmp_path / "rows.jsonl"), options, test_size=8)
    module, trainer = CorrSteer("demo", "demo", layers=[1], rule="all", check_alignment="off"), make_trainer()
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    show(metrics_table("Test [bold]", module.metrics["groups"]))
    shown = capsys.readouterr().out
    assert "[/x] :train:" in shown
    assert "Test [bold]" in shown


@pytest.mark.parametrize("joined", [True, False])
def test_a_part_given_as_a_file_keeps_options_by_name(joined, tmp_path):
    (tmp_path / "d.yaml").write_text("task_args: {a: 1, b: 2}\n")
    part = [f"--data={tmp_path}/d.yaml"] if joined else ["--data", f"{tmp_path}/d.yaml"]
    *_, whole = with_whole_dicts(["fit", *part, "--data.task_args.b", "3"])
    assert whole == '--data.task_args={"a": 1, "b": 3}'


def test_a_configuration_is_printed_without_a_checkpoint(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["test", "--config", "demo.yaml", "--print_config=skip_null"])
    assert stopped.value.code == 0
    assert "llm: demo" in capsys.readouterr().out
