"""The command line, in one process where that is enough, and as a user runs it where it matters."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from corrsteer_pl import demo
from corrsteer_pl.cli import arguments
from corrsteer_pl.cli.program import main
from corrsteer_pl.files import read_rows, write_jsonl
from corrsteer_pl.methods.runs.loading import load_fit
from tests.conftest import cli
from tests.processes import forked

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))
SMALL = ["--data.train_size=96", "--data.val_size=32", "--data.test_size=48", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder in which demo.yaml has been fitted."""
    folder = tmp_path_factory.mktemp("run")
    forked("fit", "--config", "demo.yaml", *SMALL, cwd=folder)
    return folder


@pytest.fixture
def here(run, monkeypatch):
    monkeypatch.chdir(run)
    return run


CKPT = "checkpoints/demo/last.ckpt"


def metrics(name):
    return json.loads(Path(f"checkpoints/demo/test/{name}/metrics.json").read_text())


def refused(capsys, *args):
    """The one sentence that a mistake is answered with."""
    assert main([*args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_a_fit_leaves_its_results(here):
    files = {str(p.relative_to("checkpoints/demo")) for p in Path("checkpoints/demo").rglob("*") if p.is_file()}
    assert {"last.ckpt", "config.yaml", "selection.json", "features.json", "steering.safetensors"} <= files
    assert not [f for f in files if "tmp" in f]
    selection = json.loads(Path("checkpoints/demo/selection.json").read_text())
    assert selection["samples"] == 96
    assert selection["llm"]["name"] == "demo"
    keys = {"layer", "site", "index", "sign", "coefficient", "correlation", "score", "active_right", "active_wrong"}
    keys |= {
        "mean_right",
        "mean_wrong",
        "validation_reward",
        "validation_better",
        "validation_worse",
        "neuronpedia",
        "search_p_value",
        "validation_error",
        "stability",
    }
    assert keys == set(selection["candidates"][0])
    assert 0 <= selection["joint_reward"] <= 1
    assert yaml.safe_load(Path("checkpoints/demo/config.yaml").read_text())["data"]["train_size"] == 96


def test_test_needs_nothing_but_the_checkpoint(here):
    assert main(["test", "--ckpt_path", CKPT]) == 0
    m = metrics("demo_qa")
    assert (m["task"], m["split"], m["model"], m["n"], m["scale"]) == ("demo_qa", "test", "demo", 48, 1.0)
    outcomes = read_rows(Path("checkpoints/demo/test/demo_qa/outcomes.jsonl"))
    assert len(outcomes) == 48
    assert sum(o["reward_steered"] for o in outcomes) / 48 == pytest.approx(m["reward_steered"])
    assert {"id", "prompt", "gold", "answer_baseline", "answer_steered", "reward_baseline"} <= set(outcomes[0])


def test_the_command_line_overrules_the_checkpoint(here):
    assert main(["test", "--ckpt_path", CKPT, "--model.scale", "0"]) == 0
    zero = metrics("demo_qa-scale-0")
    assert (zero["scale"], zero["difference"], zero["changed"], zero["side_effect_ratio"]) == (0, 0, 0, None)
    assert main(["test", f"--ckpt_path={CKPT}", "--model.scale=4", "--data.test_size=20"]) == 0
    four = metrics("demo_qa-scale-4-test_size-20")
    assert (four["scale"], four["n"]) == (4, 20)
    assert four["changed"] > 0


def test_a_configuration_overrules_the_checkpoint_and_is_overruled(here):
    Path("mine.yaml").write_text("model: {scale: 3.0, positions: prompt_last}\ndata: {test_size: 30}\n")
    assert main(["test", "--config", "mine.yaml", "--ckpt_path", CKPT, "--data.test_size", "10"]) == 0
    m = metrics("demo_qa-scale-3-positions-prompt_last-test_size-10")
    assert (m["scale"], m["n"]) == (3.0, 10)


def test_another_task_is_a_transfer(here):
    assert main(["test", "--config", "demo_refusal.yaml", "--ckpt_path", CKPT, "--data.test_size", "24"]) == 0
    m = metrics("demo_refusal-test_size-24")
    assert (m["task"], m["n"]) == ("demo_refusal", 24)
    assert set(m["groups"]) == {"harmful", "harmless"}


def test_predict_writes_texts(here):
    assert main(["predict", "--ckpt_path", CKPT, "--data.test_size", "5", "--results.tag", "few"]) == 0
    rows = read_rows(Path("checkpoints/demo/predict/demo_qa-few.jsonl"))
    assert [set(row) for row in rows] == [{"id", "prompt", "baseline", "steered"}] * 5


def test_validate_tests_the_candidates_again(here, capsys):
    before = Path("checkpoints/demo/selection.json").read_bytes()
    assert main(["validate", "--ckpt_path", CKPT]) == 0
    assert "Candidates after 96 samples" in capsys.readouterr().out
    assert Path("checkpoints/demo/selection.json").read_bytes() == before


def test_a_second_fit_overwrites_the_first(here):
    assert main(["fit", "--config", "demo.yaml", *SMALL, "--trainer.default_root_dir=checkpoints/twice"]) == 0
    assert main(["fit", "--config", "demo.yaml", *SMALL, "--trainer.default_root_dir=checkpoints/twice"]) == 0


def test_last_means_the_runs_own_checkpoint(here, capsys):
    assert main(["test", "--config", "demo.yaml", "--ckpt_path", "last", "--data.test_size", "8"]) == 0
    error = refused(capsys, "test", "--config", "demo_refusal.yaml", "--ckpt_path", "last")
    assert "checkpoints/demo_refusal/last.ckpt' does not exist" in error


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses_and_names_its_command(config, capsys):
    command = config.read_text().splitlines()[0]
    assert command.startswith("# python -m corrsteer_pl ")
    with pytest.raises(SystemExit) as stopped:
        main([*command.split()[4:], "--print_config"])
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]


def test_configurations_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert arguments.with_found_configs(["fit", "--config=demo.yaml"])[1].endswith("configs/demo.yaml")
    Path("configs").mkdir()
    Path("configs/demo.yaml").write_text("")
    assert arguments.with_found_configs(["fit", "--config", "demo.yaml"])[2] == "configs/demo.yaml"
    Path("demo.yaml").write_text("")
    assert arguments.with_found_configs(["fit", "-c", "demo.yaml"])[2] == "demo.yaml"


def test_fast_dev_run(here):
    assert main(["fit", "--config", "demo.yaml", "--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false",
                 "--trainer.default_root_dir=checkpoints/fast"]) == 0  # fmt: skip


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["fit", "--config", "nosuch.yaml"], "'nosuch.yaml' was found neither as given nor in configs/"),
        (["fit", "--model.rule", "nix"], "model.rule"),
        (["fit", "--model.nix", "1"], "model.nix"),
        (["fit", "--config", "demo.yaml", "--data.task", "nosuch"], "data.task is 'nosuch'; choose one of mmlu"),
        (["fit", "--config", "demo.yaml", "--model.layers", "[7]"], r"layer 7 is not in demo (layers 0..3)"),
        (["fit", "--config", "demo.yaml", "--model.saes", "nowhere"], "the SAEs 'nowhere' do not exist"),
        (["fit", "--config", "demo.yaml", "--data.path", "nowhere"], "data.path is 'nowhere', which does not exist"),
        (["fit", "--config", "demo.yaml", "--trainer.precision", "bf16-true"], "model.dtype"),
        (["fit", "--config", "demo.yaml", "--trainer.strategy", "fsdp"], "`fsdp` requires a GPU"),
        (["fit", "--config", "demo.yaml", "--data.train_size", "-5"], "data.train_size is -5"),
        (["fit", "--config", "demo.yaml", "--model.layers", "[]"], "model.layers is empty"),
        (["fit", "--config", "demo.yaml", "--trainer.min_epochs", "2"], "would count every sample twice"),
        (
            ["fit", "--config", "demo.yaml", "--trainer.max_epochs", "0"],
            "--trainer.max_epochs is 0, which leaves nothing",
        ),
        (
            ["fit", "--config", "demo.yaml", "--trainer.max_steps", "0"],
            "--trainer.max_steps is 0, which leaves nothing",
        ),
        (["fit", "--config", "demo.yaml", "--trainer.limit_train_batches", "0"], "limit_train_batches is 0, which"),
        (["fit", "--config", "demo.yaml", "--data.shots", "100000"], "data.shots is 100000, but the fit split has"),
        (["test"], "test needs the checkpoint of a fit. Give it with --ckpt_path"),
        (["test", "--ckpt_path", "nowhere.ckpt"], "the checkpoint 'nowhere.ckpt' does not exist"),
        (["predict", "--ckpt_path", "last"], "last.ckpt' does not exist"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(args, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(capsys, *args)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_bad_checkpoints_are_one_sentence(here, capsys, tmp_path):
    whole = Path(CKPT).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    assert "cut.ckpt' is damaged" in refused(capsys, "test", "--ckpt_path", str(tmp_path / "cut.ckpt"))
    (tmp_path / "text.ckpt").write_text("hello")
    assert "text.ckpt' is damaged" in refused(capsys, "test", "--ckpt_path", str(tmp_path / "text.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    assert "not written by corrsteer_pl" in refused(capsys, "test", "--ckpt_path", str(tmp_path / "foreign.ckpt"))
    checkpoint = torch.load(CKPT, weights_only=True)
    checkpoint["corrsteer_pl"]["state"]["selection"] = None
    torch.save(checkpoint, tmp_path / "unfinished.ckpt")
    error = refused(capsys, "test", "--ckpt_path", str(tmp_path / "unfinished.ckpt"))
    assert "has not been fitted" in error


@pytest.mark.parametrize(("limit", "sentence"), [("0", "which leaves nothing to do"), ("0.001", "limit_test_batches")])
def test_tests_of_nothing_are_one_sentence(here, capsys, limit, sentence):
    assert sentence in refused(capsys, "test", "--ckpt_path", CKPT, "--trainer.limit_test_batches", limit)


def test_options_that_a_fit_settles_cannot_be_changed(here, capsys):
    assert "model.pool is mean" in refused(capsys, "test", "--ckpt_path", CKPT, "--model.pool", "mean")
    assert "model.site is resid_pre" in refused(capsys, "test", "--ckpt_path", CKPT, "--model.site", "resid_pre")


def test_resuming_with_other_data_is_refused(here, capsys):
    error = refused(capsys, "fit", "--config", "demo_refusal.yaml", "--ckpt_path", CKPT)
    assert "data.task is demo_refusal, but the checkpoint was fitted with demo_qa" in error
    error = refused(capsys, "fit", "--config", "demo.yaml", *SMALL, "--data.seed=5", "--ckpt_path", CKPT)
    assert "data.seed is 5, but the checkpoint was fitted with 0" in error


def test_a_broken_row_names_file_and_line_and_keeps_the_old_run(here, capsys, tmp_path):
    before = {p: p.read_bytes() for p in Path("checkpoints/demo").rglob("*") if p.is_file()}
    write_jsonl(tmp_path / "rows.jsonl", [{"q": "x"}])
    (tmp_path / "broken.jsonl").write_text('{"question": \n')
    error = refused(
        capsys, "fit", "--config", "demo.yaml", "--data.task=choice", f"--data.path={tmp_path}/broken.jsonl"
    )
    assert "broken.jsonl, line 1: no valid JSON" in error
    error = refused(capsys, "fit", "--config", "demo.yaml", "--data.task=choice", f"--data.path={tmp_path}/rows.jsonl")
    assert "column 'question' is not in the data (columns: q)" in error
    assert {p: p.read_bytes() for p in Path("checkpoints/demo").rglob("*") if p.is_file()} == before


def test_an_unwritable_folder_is_one_sentence(here, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    error = refused(capsys, "fit", "--config", "demo.yaml", f"--trainer.default_root_dir={tmp_path}/file/run")
    assert "cannot be written" in error


def test_broken_configurations_are_one_sentence(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("model: [1,\n")
    assert "is no valid YAML" in refused(capsys, "fit", "--config", str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "list.yaml" in refused(capsys, "fit", "--config", str(tmp_path / "list.yaml"))


def test_options_that_are_not_single_tokens_are_named(tmp_path, capsys, llm, monkeypatch):
    from corrsteer_pl.errors import UserError

    with pytest.raises(UserError, match=r"the option ' Zeppelin' is \d+ tokens for the tokenizer of demo"):
        llm.single_tokens([" Zeppelin"])


def test_more_processes_than_samples_are_refused():
    from types import SimpleNamespace

    from corrsteer_pl import TaskDataModule
    from corrsteer_pl.errors import UserError

    data = TaskDataModule("demo_qa", train_size=3)
    data.setup("fit")
    data.trainer = SimpleNamespace(world_size=4, global_rank=0, lightning_module=SimpleNamespace(counted=0))
    with pytest.raises(UserError, match="4 processes share 3 train samples; each needs at least one"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("option", "samples"),
    [("max_steps=2", 64), ("check_val_every_n_epoch=2", 96), ("val_check_interval=2", 96)],
)
def test_a_fit_selects_on_all_that_it_counted(option, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "demo.yaml", *SMALL, f"--trainer.{option}"]) == 0
    selection = json.loads(Path("checkpoints/demo/selection.json").read_text())
    assert selection["samples"] == samples
    assert torch.load(CKPT, weights_only=True)["corrsteer_pl"]["state"]["selection"]["samples"] == samples


def test_the_command_line_overrules_a_configuration_in_any_order(here):
    Path("two.yaml").write_text("model: {scale: 2.0}\nckpt_path: null\n")
    assert main(["test", "--ckpt_path", CKPT, "--model.scale", "0.5", "--config", "two.yaml"]) == 0
    assert metrics("demo_qa-scale-0.5")["scale"] == 0.5


def test_a_printed_configuration_can_be_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "demo.yaml", *SMALL, "--print_config"])
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert main(["fit", "--config", "printed.yaml"]) == 0
    assert Path("checkpoints/printed/last.ckpt").exists()


def test_a_refused_fit_and_a_trial_run_leave_an_earlier_run_alone(here, capsys, tmp_path):
    before = {p: p.read_bytes() for p in Path("checkpoints/demo").glob("*.*")}
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Request: {i}\nResponse:", "a": "never"} for i in range(60)])
    options = ["--data.task=generic", f"--data.path={tmp_path}/rows.jsonl", "--data.task_args={answer: a}"]
    steps = ["--data.batch_size=2", "--results.every_n_train_steps=1"]
    assert "rewards are 0" in refused(capsys, "fit", "--config", "demo.yaml", *options, *steps)
    assert main(["fit", "--config", "demo.yaml", *SMALL, "--trainer.fast_dev_run=true"]) == 0
    assert {p: p.read_bytes() for p in Path("checkpoints/demo").glob("*.*")} == before


def test_a_checkpoint_can_be_used_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    rows = [{"prompt": f"Request: sing {i} songs\nResponse:", "harmful": i % 2 == 0} for i in range(60)]
    write_jsonl(Path("rows.jsonl"), rows)
    shutil.copytree(demo.MODEL, "village")
    shutil.copytree(demo.SAES, "dictionaries")
    task = ["--data.task=refusal", "--data.path=rows.jsonl", "--data.task_args={max_new_tokens: 3}"]
    places = ["--model.llm=village", "--model.saes=dictionaries"]
    assert main(["fit", "--config", "demo.yaml", *task, *places, *SMALL]) == 0
    monkeypatch.chdir(tmp_path / "two")
    assert load_fit(Path("../one/checkpoints/demo")).method.llm.name == str(tmp_path / "one/village")
    assert main(["test", "--ckpt_path", "../one/checkpoints/demo/last.ckpt"]) == 0


def test_equal_rewards_are_found_also_in_part_of_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Request: {i}\nResponse:", "a": "never"} for i in range(60)])
    options = ["--data.task=generic", "--data.path=rows.jsonl", "--data.task_args={answer: a}", "--data.batch_size=8"]
    error = refused(capsys, "fit", "--config", "demo.yaml", *options, "--trainer.limit_train_batches=2")
    assert "all 16 rewards are 0" in error


def test_help_is_shown():
    done = cli("--help", cwd=".")
    assert all(command in done.stdout for command in ("fit", "validate", "test", "predict"))
