"""Every system under one evaluation: cells, the table that they make, and going on after an interruption."""

import csv
import json
import os
import signal
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from corrsteer_pl.cli.compare import SYSTEMS
from corrsteer_pl.cli.measuring import claimed
from corrsteer_pl.cli.program import main
from corrsteer_pl.evaluation.comparison import Cell, lines, markdown
from corrsteer_pl.evaluation.paired import Z_95
from corrsteer_pl.files import read_rows, write_jsonl
from corrsteer_pl.methods.registry import METHODS, READY
from tests.processes import Command

SMALL = ["--data.train_size=64", "--data.val_size=16", "--data.test_size=24"]
METHODS_HERE = ["--methods", "corrsteer_global", "contrastive,few_shot", "rosi"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("compare"), Path.cwd()
    os.chdir(folder)
    args = ["compare", "--config", "demo.yaml", *METHODS_HERE, "--seeds", "2", "--elsewhere", "demo_refusal.yaml"]
    try:
        assert main([*args, *SMALL]) == 0
    finally:
        os.chdir(before)
    return folder / "checkpoints/compare", [*args, *SMALL]


def test_every_system_names_a_method():
    assert {system.method for system in SYSTEMS.values()} == set(METHODS) - {"bias", *READY}


def test_the_table_is_that_of_the_outcomes(compared):
    out, _ = compared
    table = json.loads((out / "table.json").read_text(encoding="utf-8"))["lines"]
    assert [line["system"] for line in table if line["refused"]] == ["rosi"]
    fitted = [line for line in table if not line["refused"]]
    assert [line["difference"] for line in fitted] == sorted((line["difference"] for line in fitted), reverse=True)
    (line,) = [line for line in fitted if line["system"] == "contrastive"]
    differences, by_seed = {}, []
    for seed in (0, 1):
        rows = read_rows(out / f"cells/demo/contrastive-{seed}/test/own/outcomes.jsonl")
        by_seed.append(statistics.fmean(r["reward_steered"] - r["reward_baseline"] for r in rows))
        for row in rows:
            differences.setdefault(row["id"], []).append(row["reward_steered"] - row["reward_baseline"])
    each = [statistics.fmean(some) for some in differences.values()]
    half = Z_95 * statistics.stdev(each) / len(each) ** 0.5
    assert line["difference"] == pytest.approx(statistics.fmean(each))
    assert (line["ci_low"], line["ci_high"]) == pytest.approx((line["difference"] - half, line["difference"] + half))
    assert line["deviation"] == pytest.approx(statistics.stdev(by_seed))
    assert line["examples"] == 64
    assert [line["examples"] for line in fitted if line["system"] == "few_shot"] == [4]
    assert line["elsewhere"] is not None
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        assert [row["system"] for row in csv.DictReader(file)] == [line["system"] for line in table]
    text = (out / "table.md").read_text(encoding="utf-8")
    assert "- rosi: rosi needs harmful and harmless requests" in text
    assert "by `python -m corrsteer_pl" in text
    picture = (out / "table.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg")
    assert "var(" not in picture  # the colours of a page that is not there


def test_finished_cells_are_kept_and_others_measured_anew(compared, monkeypatch):
    out, args = compared
    monkeypatch.chdir(out.parents[1])
    seen = []
    monkeypatch.setattr(
        "corrsteer_pl.cli.compare.measure", lambda plan, *_: seen.append((plan.name, plan.seed)) or pytest.fail("again")
    )
    assert main(args) == 0
    assert seen == []
    # Other options are another cell.
    monkeypatch.setattr(
        "corrsteer_pl.cli.compare.measure", lambda plan, *_: seen.append((plan.name, plan.seed)) or Cell(
            plan.task, plan.name, plan.seed, plan.settings, "c", "m", refused="no"
        )
    )  # fmt: skip
    assert main([*args, "--data.batch_size=8"]) == 0
    assert len(seen) == 8


def test_a_cell_is_measured_by_one_process(tmp_path):
    with claimed(tmp_path) as first, claimed(tmp_path) as second:
        assert (first, second) == (True, False)
    with claimed(tmp_path) as again:
        assert again
    # A process that was killed leaves its lock behind.
    (tmp_path / ".lock").write_text(f"{os.uname().nodename} 999999999", encoding="utf-8")
    with claimed(tmp_path) as taken_over:
        assert taken_over
    (tmp_path / ".lock").write_text("another-machine 1", encoding="utf-8")
    with claimed(tmp_path) as of_another:
        assert not of_another


def test_a_system_of_ones_own_has_its_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.yaml").write_text("quick: {method: finetune, adapter: lora, lr: 0.01}\n", encoding="utf-8")
    args = ["compare", "--config", "demo.yaml", "--methods", "quick", "--systems", "more.yaml", "--seeds=1", *SMALL]
    assert main(args) == 0
    config = json.loads(Path("checkpoints/compare/cells/demo/quick-0/system.json").read_text(encoding="utf-8"))
    assert config["method"] == "finetune"
    assert config["model"] == {"llm": "demo", "adapter": "lora", "lr": 0.01}


def test_a_line_over_seeds_is_pooled_by_question(tmp_path):
    folders = []
    for seed, rewards in enumerate(([1.0, 0.0], [1.0, 1.0])):
        folder = tmp_path / str(seed)
        rows = [{"id": f"q{i}", "reward_baseline": 0.0, "reward_steered": r} for i, r in enumerate(rewards)]
        (folder / "test/own").mkdir(parents=True)
        write_jsonl(folder / "test/own/outcomes.jsonl", rows)
        mean = sum(rewards) / 2
        metrics = {"reward_baseline": 0.0, "reward_steered": mean, "difference": mean, "better": int(sum(rewards))}
        metrics |= {"worse": 1 - seed, "measures": {"loss": {"baseline": 1.0, "steered": 2.0 + seed}}}
        b = {"difference": -0.5, "measures": {"loss": {"baseline": 3.0, "steered": 3.0}}}
        elsewhere = {"a": {"difference": 0.2 + 0.2 * seed}, "b": b}
        folders.append((folder, Cell("t", "s", seed, "x", "c", "m", metrics=metrics, elsewhere=elsewhere)))
    (line,) = lines(folders)
    assert (line.difference, line.n, line.seeds) == (0.75, 2, 2)
    assert (line.elsewhere, line.elsewhere_by_task) == (pytest.approx(-0.1), {"a": pytest.approx(0.3), "b": -0.5})
    assert line.measures == {"loss": (1.0, 2.5), "b loss": (3.0, 3.0)}
    text = markdown([line], "")
    assert "\nElsewhere:\n\n- s: a +30.0, b -50.0\n" in text
    assert "\nMeasures:\n\n- s: loss from 1.000 to 2.500, b loss from 3.000 to 3.000\n" in text
    assert line.side_effect_ratio == 1 / 4


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "compare needs tasks. Name the configuration of each"),
        (["--config", "demo.yaml", "--methods", "nix"], "the system 'nix' is not known; choose among corrsteer"),
        (["--config", "demo.yaml", "--method", "rosi"], "compare takes several methods. Name systems with --methods"),
        (["--config", "demo.yaml", "--seeds", "0"], "--seeds is 0; it is a number of seeds, at least 1"),
        (["--config", "demo.yaml", "--systems", "bad.yaml"], "bad.yaml names no method for mine. Give it one"),
        (["--config", "demo.yaml", "--config", "x/demo.yaml"], "--config names two configurations called 'demo'"),
        (["--config", "demo.yaml", "--elsewhere", "x/own.yaml"], "--elsewhere names a configuration called 'own'"),
        (["--config", "demo.yaml", "--model.topm", "2"], "--model.topm is no option of the system contrastive"),
        (["--config", "demo.yaml", "--seeds", "1", "stray.yaml"], "unrecognized arguments: stray.yaml"),
        (["--config", "demo.yaml", "--methds", "raw"], "there is no option methds; the nearest are methods"),
    ],
)
def test_mistakes_are_one_sentence(args, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("mine: {lr: 1}\n", encoding="utf-8")
    (tmp_path / "x").mkdir()
    for name in ("demo", "own"):
        (tmp_path / f"x/{name}.yaml").write_text("data: {task: demo_qa}\n", encoding="utf-8")
    assert main(["compare", *args]) == 2
    assert sentence in capsys.readouterr().err


def test_a_signal_in_the_last_batch_of_a_stage_ends_the_comparison(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = SimpleNamespace(model=SimpleNamespace(counted=1), trainer=SimpleNamespace(received_sigterm=True))
    monkeypatch.setattr("corrsteer_pl.cli.lightning.run_once", lambda *_: ended)
    assert main(["compare", "--config", "demo.yaml", "--methods", "raw", "--seeds", "1"]) == 128 + signal.SIGTERM
    assert not list(tmp_path.rglob("cell.json"))


def test_what_goes_wrong_after_a_fit_is_no_refusal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere.yaml").write_text("data: {task: choice, path: nowhere}\n", encoding="utf-8")
    args = ["--methods", "few_shot", "--seeds", "1", "--elsewhere", "nowhere.yaml", *SMALL]
    assert main(["compare", "--config", "demo.yaml", *args]) == 2
    assert "data.path is 'nowhere'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("cell.json"))


def test_elsewhere_is_what_its_own_configuration_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reversed_one = "model: {llm: demo}\ndata: {task: demo_qa, reverse: true, train_size: 8, val_size: 4}\n"
    (tmp_path / "reversed.yaml").write_text(reversed_one, encoding="utf-8")
    (tmp_path / "straight.yaml").write_text("data: {task: demo_qa}\n", encoding="utf-8")
    args = ["--methods", "few_shot", "--seeds", "1", "--elsewhere", "straight.yaml", "--data.test_size=24"]
    assert main(["compare", "--config", "reversed.yaml", *args]) == 0
    cell = Cell.read(tmp_path / "checkpoints/compare/cells/reversed/few_shot-0")
    assert cell.elsewhere["straight"]["reward_baseline"] == pytest.approx(1 - cell.metrics["reward_baseline"])


def test_a_seed_without_a_fit_leaves_those_with_one(tmp_path):
    write_jsonl(tmp_path / "0/test/own/outcomes.jsonl", [{"id": "q", "reward_baseline": 0.0, "reward_steered": 1.0}])
    metrics = {"reward_baseline": 0.0, "reward_steered": 1.0, "difference": 1.0, "better": 1, "worse": 0}
    fitted = (tmp_path / "0", Cell("t", "s", 0, "x", "c", "m", metrics=metrics))
    unfit = (tmp_path / "1", Cell("t", "s", 1, "x", "c", "m", refused="all rewards are equal."))
    for cells in ([fitted, unfit], [unfit, fitted]):
        (line,) = lines(cells)
        assert (line.seeds, line.difference, line.refused) == (1, 1.0, None)
        assert "Not for this task:\n\n- s: seed 1: all rewards are equal.\n" in markdown([line], "")


def test_configurations_of_several_methods_go_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plans = []
    monkeypatch.setattr("corrsteer_pl.cli.compare.measure", lambda plan, *_: plans.append(plan) or Cell(
        plan.task, plan.name, plan.seed, plan.settings, "c", "m", refused="no"
    ))  # fmt: skip
    configs = ["--config", "demo.yaml", "--config", "demo_rosi.yaml", "--config", "demo_crisp.yaml"]
    assert main(["compare", *configs, "--methods", "corrsteer", "rosi", "crisp", "--seeds", "1"]) == 0
    models = {(plan.task, plan.name): plan.config["model"] for plan in plans}
    assert len(models) == 9
    # A configuration's own method has all of its options, others what says which model and which SAEs.
    assert models["demo_rosi", "rosi"] == {"llm": "demo", "form": "projection"}
    assert models["demo_rosi", "crisp"] == {"llm": "demo"}
    assert models["demo_crisp", "crisp"]["k"] == 60
    assert models["demo_crisp", "corrsteer"] == {"llm": "demo", "saes": "demo"}
    assert models["demo", "corrsteer"] == {"llm": "demo", "saes": "demo", "layers": [1, 2, 3]}


@pytest.mark.slow
def test_an_interrupted_comparison_keeps_its_cells_and_goes_on(tmp_path, monkeypatch):
    args = ["compare", "--config", "demo.yaml", "--methods", "contrastive", "few_shot", "raw", "--seeds=1", *SMALL]
    command = Command(*args, cwd=tmp_path)
    cells = tmp_path / "checkpoints/compare/cells/demo"
    deadline = time.monotonic() + 120
    while not (cells / "contrastive-0/cell.json").exists():
        assert command.is_running(), command.stderr[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    command.send(signal.SIGINT)
    assert command.wait(60) == [130]
    error = command.stderr
    assert "finished cells are kept, and the same command goes on" in error
    assert "Traceback" not in error
    assert not list(cells.glob("*/.lock"))
    before = (cells / "contrastive-0/cell.json").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert main(args) == 0
    assert (cells / "contrastive-0/cell.json").stat().st_mtime_ns == before
    table = json.loads((tmp_path / "checkpoints/compare/table.json").read_text(encoding="utf-8"))["lines"]
    assert {line["system"] for line in table} == {"contrastive", "few_shot", "raw"}
