"""Every checkpoint counts the samples that its sums have, whenever it is written; a requeued job changes nothing."""

import json
import os
import signal
import stat
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.methods.accumulation.search import Search
from corrsteer_pl.methods.accumulation.strongest import Strongest
from corrsteer_pl.methods.accumulation.sums import Accumulator
from corrsteer_pl.methods.crisp import Crisp
from corrsteer_pl.methods.finetune import Finetune
from corrsteer_pl.methods.mean_difference import MeanDifference
from corrsteer_pl.methods.prompting import Prompting
from corrsteer_pl.methods.rosi import Rosi
from corrsteer_pl.methods.runs import requeue
from tests.conftest import make_trainer
from tests.methods.toy import Bias
from tests.processes import Command, free_port

pytestmark = pytest.mark.filterwarnings("ignore:model.strengths")

SMALL = {"train_size": 20, "val_size": 8, "test_size": 8, "batch_size": 4}


def corrsteer(**options):
    return CorrSteer("demo", "demo", layers=[1], permutations=19, **options)


# Each with its data, and whether it counts a batch at the end of training_step or only at the optimiser's step.
METHODS = {
    "corrsteer": (corrsteer, {}, "sums"),
    "shuffled": (lambda: corrsteer(control="shuffled_rewards"), {}, "sums"),
    "mean_difference": (lambda: MeanDifference("demo", layers=[1]), {}, "sums"),
    "rosi": (
        lambda: Rosi("demo", layers=[1], topm=1, strengths=[1.0]),
        {"task": "demo_refusal", "val_size": 40},
        "sums",
    ),
    "prompting": (lambda: Prompting("demo", examples=1), {}, "sums"),
    "finetune": (lambda: Finetune("demo", "lora", rank=2), {}, "weights"),
    "crisp": (
        lambda: Crisp("demo", "demo", layers=[1], k=3, rank=2, dropout=0.0, least_ratio=1.1),
        {"task": "demo_forget", "restrict": "evaluation", "fit_on": {"task": "demo_texts"}},
        "weights",
    ),
    "another": (lambda: Bias("demo"), {}, "weights"),
}


def data(**options):
    return TaskDataModule(**{**SMALL, **options})


class Saving(Callback):
    """Saves in every hook of the third step, as a user's callback may."""

    def __init__(self, folder, step=2):
        self.folder, self.step = folder, step

    def save(self, trainer, name):
        if trainer.fit_loop.batch_idx == self.step:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_start(self, trainer, module):
        training_step = module.training_step

        def within_step(*args):
            self.save(trainer, "within_step")
            return training_step(*args)

        module.training_step = within_step

    def on_train_batch_start(self, trainer, *_):
        self.save(trainer, "batch_start")

    def on_before_zero_grad(self, trainer, *_):
        self.save(trainer, "before_zero_grad")

    def on_after_backward(self, trainer, *_):
        self.save(trainer, "after_backward")

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "batch_end")


def counter_and_sums(path):
    """The counter of a checkpoint, and the number of samples in each of its sums, read without the package."""
    checkpoint = torch.load(path, weights_only=True)
    record, tensors = checkpoint["corrsteer_pl"], checkpoint["state_dict"]
    left = (record["state"].get("search") or {}).get("left")
    blocks = left["blocks"]["waiting"] if left else None
    waiting = len(blocks["rows"]) if blocks else 0
    deals = waiting and record["state"]["search"]["options"]["deal"]
    numbers = []
    for name in (name for name in tensors if name.endswith(".n")):
        is_search = name.startswith("search.")
        numbers.append(tensors[name].sum().item() + (waiting if is_search or deals else 0))
    return record["counted"], numbers


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_of_any_hook_counts_what_its_sums_have(name, tmp_path):
    make, options, counts_at = METHODS[name]
    module = make()
    make_trainer(callbacks=[Saving(tmp_path)], limit_train_batches=4).fit(module, datamodule=data(**options))
    # Batches of 4: two steps are done when the third starts; sums change in it, weights at its end.
    during = 12 if counts_at == "sums" else 8
    expected = {"batch_start": 8, "within_step": 8, "before_zero_grad": during, "after_backward": during}
    expected["batch_end"] = 12
    for hook, count in expected.items():
        counted, sums = counter_and_sums(tmp_path / f"{hook}.ckpt")
        assert counted == count, hook
        assert set(sums) <= {count}, hook
        assert bool(sums) == (name in ("corrsteer", "shuffled", "mean_difference", "rosi")), hook


@pytest.mark.parametrize("name", ["corrsteer", "finetune"])
def test_a_checkpoint_within_accumulated_gradients_counts_what_was_learnt(name, tmp_path):
    make, options, _ = METHODS[name]
    trainer = make_trainer(callbacks=[Saving(tmp_path)], limit_train_batches=4, accumulate_grad_batches=2)
    trainer.fit(make(), datamodule=data(**options))
    counted, sums = counter_and_sums(tmp_path / "batch_end.ckpt")
    # The third batch is in the sums, but its gradient waits for that of the fourth.
    assert counted == (12 if name == "corrsteer" else 8)
    assert set(sums) <= {counted}


@pytest.mark.parametrize("hook", ["batch_start", "before_zero_grad", "batch_end"])
def test_a_fit_goes_on_from_within_accumulated_gradients(hook, tmp_path):
    def fit(**options):
        module = Finetune("demo", "lora", rank=2)
        path = options.pop("ckpt_path", None)
        trainer = make_trainer(accumulate_grad_batches=2, **options)
        trainer.fit(module, datamodule=data(train_size=24), ckpt_path=path)
        return module

    whole = fit(callbacks=[Saving(tmp_path)])
    resumed = fit(ckpt_path=tmp_path / f"{hook}.ckpt")
    assert resumed.counted == 24
    for name, weight in whole.own.weights.items():
        torch.testing.assert_close(resumed.own.weights[name], weight, msg=name)


@pytest.mark.parametrize("hook", ["within_step", "before_zero_grad", "batch_end"])
@pytest.mark.parametrize("name", ["corrsteer", "shuffled", "mean_difference"])
def test_a_fit_that_goes_on_from_within_a_step_selects_what_an_uninterrupted_one_does(name, hook, tmp_path):
    make, _, _ = METHODS[name]
    whole, resumed = make(), make()
    make_trainer(callbacks=[Saving(tmp_path)]).fit(whole, datamodule=data())
    trainer = make_trainer()
    trainer.fit(resumed, datamodule=data(), ckpt_path=tmp_path / f"{hook}.ckpt")
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    counted, sums = counter_and_sums(tmp_path / "end.ckpt")
    assert (counted, set(sums)) == (20, {20})
    one, other = whole.selection, resumed.selection
    assert [f.name for f in one.candidates] == [f.name for f in other.candidates]
    assert one.features == other.features
    assert one.null_maxima == pytest.approx(other.null_maxima, abs=1e-12)


@pytest.mark.parametrize(
    "saves",
    [
        lambda folder: ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1),
        lambda folder: ModelCheckpoint(folder, "{step}", train_time_interval=timedelta(microseconds=1), save_top_k=-1),
    ],
    ids=["steps", "time"],
)
def test_checkpoints_of_lightning_count_what_their_sums_have(saves, tmp_path):
    trainer = make_trainer(callbacks=[saves(tmp_path)], enable_checkpointing=True)
    trainer.fit(corrsteer(), datamodule=data())
    found = sorted(counter_and_sums(path) for path in tmp_path.glob("*.ckpt"))
    assert len(found) >= 2
    assert all(set(sums) == {counted} for counted, sums in found)


class Broken(RuntimeError):
    """What ends a step."""


def fit_that_fails(owner, name, monkeypatch, folder, after):
    """A fit whose third call of a method fails, before or after it runs, with a callback that then saves."""
    original, calls = getattr(owner, name), []

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 3 and not after:
            raise Broken("the cause")
        result = original(self, *args)
        if len(calls) == 3:
            raise Broken("the cause")
        return result

    monkeypatch.setattr(owner, name, failing)
    trainer = make_trainer(callbacks=[OnExceptionCheckpoint(folder)], enable_checkpointing=True)
    trainer.fit(corrsteer(), datamodule=data())


@pytest.mark.filterwarnings("ignore:.*ckpt_path")
def test_a_step_that_fails_before_its_update_leaves_a_checkpoint_without_it(tmp_path, monkeypatch):
    with pytest.raises(Broken):
        fit_that_fails(CorrSteer, "training_step", monkeypatch, tmp_path, after=False)
    assert counter_and_sums(tmp_path / "on_exception.ckpt") == (8, [8, 8])


@pytest.mark.filterwarnings("ignore:.*ckpt_path")
@pytest.mark.parametrize(("owner", "name"), [(Accumulator, "update"), (Strongest, "add"), (Search, "add")])
def test_no_checkpoint_is_written_of_a_step_that_fails_during_its_update(owner, name, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"8 samples was interrupted \(the cause\)"):
        fit_that_fails(owner, name, monkeypatch, tmp_path, after=True)
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_checkpoint_whose_sums_lack_a_step_is_not_written(tmp_path):
    module, trainer = corrsteer(), make_trainer()
    trainer.fit(module, datamodule=data())
    module.counted = 24
    with pytest.raises(UserError, match="counts 24 samples, but its sums .* have 20"):
        trainer.save_checkpoint(tmp_path / "wrong.ckpt")


def changed(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("name", ["corrsteer", "shuffled", "mean_difference", "rosi"])
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_checkpoint_whose_counter_differs_from_its_sums_is_rejected(name, stage, tmp_path):
    make, options, _ = METHODS[name]
    make_trainer(callbacks=[Saving(tmp_path)]).fit(make(), datamodule=data(**options))
    path = changed(tmp_path / "batch_end.ckpt", lambda checkpoint: checkpoint["corrsteer_pl"].update(counted=16))
    with pytest.raises(UserError, match="counts 16 samples, but its sums .* have 12"):
        getattr(make_trainer(), stage)(make(), datamodule=data(**options), ckpt_path=path)


def test_samples_that_are_left_out_of_sums_are_counted(tmp_path, monkeypatch):
    accumulate = CorrSteer.accumulate

    def spoilt(self, batch, reader, rewards):
        first = torch.tensor([[i == 0] for i in range(len(rewards))])
        values = {key: x.masked_fill(first, float("nan")) for key, x in reader.values.items()}
        accumulate(self, batch, SimpleNamespace(values=values), rewards)

    monkeypatch.setattr(CorrSteer, "accumulate", spoilt)
    with pytest.warns(UserWarning, match="5 of 20 samples have activations"):
        make_trainer(callbacks=[Saving(tmp_path)]).fit(corrsteer(), datamodule=data())
    checkpoint = torch.load(tmp_path / "batch_end.ckpt", weights_only=True)
    assert checkpoint["corrsteer_pl"]["counted"] == 12
    # One of each batch of four.
    assert checkpoint["state_dict"]["sums.merged.layer1_max.n"] == 9


@pytest.mark.parametrize(
    "make", [lambda **o: MeanDifference("demo", **o), lambda **o: CorrSteer("demo", raw=True, **o)]
)
def test_a_fit_does_not_go_on_with_other_layers(make, tmp_path):
    make_trainer(callbacks=[Saving(tmp_path)]).fit(make(layers=[1]), datamodule=data())
    with pytest.raises(UserError, match=r"model.layers .* 2, but the checkpoint was fitted with 1"):
        make_trainer().fit(make(layers=[2]), datamodule=data(), ckpt_path=tmp_path / "batch_end.ckpt")


# ---------------------------------------------------------------- SLURM

# The reward sends the signal within a step, and ends the process once SLURM has been asked to requeue the job.
REWARD = """
import os, signal
from pathlib import Path
from corrsteer_pl.rewards import reward

calls = 0

@reward
def signalling(text, gold):
    global calls
    if Path("requeued").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    calls += 1
    rank = os.environ["SLURM_PROCID"]
    if str(calls) == os.environ.get("SIGNAL_AT") and os.environ.get("SIGNAL_RANK", rank) == rank:
        os.kill(os.getpid(), signal.SIGUSR1)
    return float(int(gold) % 3 == 0)
"""
TASK = '{prompt: "{q}", answer: a, reward: mine.signalling, max_new_tokens: 2}'
FIT = [
    "fit", "--model.llm=demo", "--model.saes=demo", "--model.layers=[1]", "--model.permutations=19",
    "--data.task=generic", "--data.path=rows.jsonl", f"--data.task_args={TASK}", "--data.batch_size=4",
    "--data.train_size=60", "--data.val_size=12", "--data.test_size=12",
    "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.default_root_dir=run",
]  # fmt: skip


def slurm(rank=0, ranks=1):
    return {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": str(ranks),
        "SLURM_NTASKS_PER_NODE": str(ranks),
        "SLURM_NNODES": "1", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
    }  # fmt: skip


@pytest.fixture
def job(tmp_path):
    """A folder with rows, a reward, and a scontrol that writes what it was called with."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "mine.py").write_text(REWARD, encoding="utf-8")
    write_jsonl(folder / "rows.jsonl", [{"q": f"Request: sing {i} songs", "a": str(i)} for i in range(150)])
    stub(folder, 'echo "$@" >> requeued')
    return folder


def stub(folder, script):
    (folder / "bin").mkdir(exist_ok=True)
    file = folder / "bin/scontrol"
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def start(job, *options, ranks=1, **env):
    """A job of one or more tasks, each of them a process."""
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"] if ranks == 2 else []
    common = {"PATH": f"{job / 'bin'}:{os.environ['PATH']}", "MASTER_PORT": str(free_port())}
    tasks = [
        Command(*FIT, *two, *options, cwd=job, env={**slurm(rank, ranks), **common, **env}) for rank in range(ranks)
    ]
    statuses = [task.wait()[0] for task in tasks]
    return statuses, tasks[0].stdout, "".join(task.stderr for task in tasks)


def selected(run):
    selection = json.loads((run / "selection.json").read_text(encoding="utf-8"))
    assert counter_and_sums(run / "last.ckpt")[0] == selection["samples"]
    features = [(f["layer"], f["index"], f["validation_reward"]) for f in selection["candidates"]]
    correlations = [f["correlation"] for f in selection["candidates"]]
    return selection["samples"], features, correlations, selection["null_maxima"]


def same_selection(one, other):
    assert one[:2] == other[:2]
    for values, others in zip(one[2:], other[2:], strict=True):
        assert values == pytest.approx(others, abs=1e-9)


def uninterrupted(job):
    statuses, _, stderr = start(job, "--trainer.default_root_dir=whole")
    assert statuses == [0], stderr
    return selected(job / "whole")


@pytest.mark.parametrize(
    ("ranks", "rank"),
    [(1, "0"), pytest.param(2, "0", marks=pytest.mark.slow), pytest.param(2, "1", marks=pytest.mark.slow)],
)
def test_a_requeued_job_selects_what_an_uninterrupted_fit_does(ranks, rank, job):
    expected = uninterrupted(job)
    # Within the sixth step of this process, and on one process alone.
    statuses, _, stderr = start(job, ranks=ranks, SIGNAL_AT="22", SIGNAL_RANK=rank)
    assert statuses == [-signal.SIGKILL] * ranks, stderr
    assert (job / "requeued").read_text(encoding="utf-8") == "requeue 4711\n"
    counted, sums = counter_and_sums(job / "run/hpc_ckpt_1.ckpt")
    assert counted == 24 * ranks
    assert set(sums) == {counted}
    (job / "requeued").unlink()
    statuses, stdout, stderr = start(job, ranks=ranks)
    assert statuses == [0] * ranks, stderr
    assert "Resuming from run/hpc_ckpt_1.ckpt" in stdout.replace("\n", " ")
    same_selection(selected(job / "run"), expected)
    # A finished fit leaves nothing that a later job would resume from.
    assert not list((job / "run").glob("*hpc*"))
    assert not list((job / "run").glob(".*"))


@pytest.mark.slow
def test_a_job_that_is_requeued_in_validation_and_again_selects_the_same(job):
    expected = uninterrupted(job)
    for number, at in enumerate(["22", "40"], start=1):  # then, after 24 samples, within the validation
        start(job, SIGNAL_AT=at)
        (job / "requeued").unlink()
        assert [path.name for path in (job / "run").glob("hpc*")] == [f"hpc_ckpt_{number}.ckpt"]
    assert counter_and_sums(job / "run/hpc_ckpt_2.ckpt")[0] == 60
    statuses, _, stderr = start(job)
    assert statuses == [0], stderr
    same_selection(selected(job / "run"), expected)


@pytest.mark.parametrize(
    "script", ["echo 'Requested operation not permitted' >&2; exit 1", None], ids=["refused", "missing"]
)
def test_a_job_that_slurm_does_not_requeue_goes_on(script, job):
    (job / "bin/scontrol").unlink()
    if script:
        stub(job, script)
    statuses, _, stderr = start(job, SIGNAL_AT="22")
    assert statuses == [0], stderr
    assert "Traceback" not in stderr
    assert "hpc_ckpt_1.ckpt" in stderr
    assert "not requeued" in stderr
    assert ("not permitted" if script else "scontrol") in stderr
    assert selected(job / "run")[0] == 60


def test_a_checkpoint_of_another_fit_is_rejected_by_name(job):
    start(job, SIGNAL_AT="22")
    (job / "requeued").unlink()
    path = job / "run/hpc_ckpt_1.ckpt"
    whole = path.read_bytes()
    others = {
        "--data.seed=1": "data.seed is 1",
        "--data.train_size=40": "data.train_size is 40",
        "--model.pool=mean": "model.pool is mean",
        "--model.control=shuffled_rewards": "model.control is shuffled_rewards",
    }
    for option, named in others.items():
        statuses, _, stderr = start(job, option)
        assert statuses == [2], stderr
        assert "run/hpc_ckpt_1.ckpt" in stderr
        assert named in stderr
    changed(path, lambda checkpoint: checkpoint["corrsteer_pl"].update(counted=28))
    statuses, _, stderr = start(job)
    assert statuses == [2]
    assert "run/hpc_ckpt_1.ckpt" in stderr
    assert "counts 28 samples" in stderr
    path.write_bytes(whole[: len(whole) // 2])
    statuses, _, stderr = start(job)
    assert statuses == [2]
    assert "run/hpc_ckpt_1.ckpt" in stderr
    assert "Traceback" not in stderr
    path.unlink()
    assert start(job)[0] == [0]


def test_names_that_lightning_takes_for_checkpoints_are_rejected_by_name(tmp_path, monkeypatch):
    for name, value in slurm().items():
        monkeypatch.setenv(name, value)
    assert requeue.requeue_checkpoint(tmp_path) is None
    # Lightning reads the digits 1 and 2 of this name as 12.
    (tmp_path / "hpc_ckpt_1-v2.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="hpc_ckpt_12.ckpt"):
        requeue.requeue_checkpoint(tmp_path)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert requeue.requeue_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_JOB_ID": "7"}, "requeue 7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "requeue 7_2"),
        ({"SLURM_JOB_ID": "7; rm -r run"}, None),
        ({}, None),
    ],
)
def test_the_job_is_requeued_by_its_number(variables, expected, job, monkeypatch):
    monkeypatch.chdir(job)
    monkeypatch.setenv("PATH", f"{job / 'bin'}:{os.environ['PATH']}")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    error = requeue.requeue_job()
    assert (error is None) == (expected is not None)
    assert not expected or (job / "requeued").read_text(encoding="utf-8").strip() == expected
