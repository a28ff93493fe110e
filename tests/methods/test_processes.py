"""Several processes, and fits that are killed: the answer must not change."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from corrsteer_pl import demo
from corrsteer_pl.files import read_rows, write_jsonl
from corrsteer_pl.methods.runs.provenance import read_checkpoint
from tests.conftest import cli, run_here
from tests.processes import FORKS, Command, forked

# 101 and 33 divide by nothing that is used here. One prompt a batch: an interruption leaves all batches as they were.
DATA = ["--data.train_size=101", "--data.val_size=33", "--data.test_size=35", "--data.batch_size=1"]
# Whatever is tried while validating, features together included, has to be the same on all processes.
METHOD = ["--model.rule=greedy", "--model.layers=[1,2]", "--model.permutations=19"]
FIT = ["fit", "--config", "demo.yaml", *METHOD, *DATA, "--trainer.enable_progress_bar=false"]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_here(*FIT, cwd=folder)
    run_here("test", "--ckpt_path", "checkpoints/demo/last.ckpt", cwd=folder)
    return folder / "checkpoints/demo"


def same_fit(one, other, rtol=1e-12, atol=1e-12):
    a, b = (torch.load(run / "last.ckpt", weights_only=True) for run in (one, other))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for key, value in a["state_dict"].items():
        # Sums of float64; only the order of additions may differ.
        torch.testing.assert_close(value, b["state_dict"][key], rtol=rtol, atol=atol)
    one, other = (json.loads((run / "selection.json").read_text()) for run in (one, other))
    assert one["samples"] == other["samples"] == 101
    for f, g in zip(one["candidates"], other["candidates"], strict=True):
        assert (f["layer"], f["index"], f["validation_reward"]) == (g["layer"], g["index"], g["validation_reward"])
        assert f["correlation"] == pytest.approx(g["correlation"], abs=max(rtol, 1e-9))
    assert [f["index"] for f in one["features"]] == [f["index"] for f in other["features"]]
    for name in ("baseline_reward", "joint_reward", "steps"):
        assert one[name] == other[name]
    assert one["null_maxima"] == pytest.approx(other["null_maxima"], abs=max(rtol, 1e-9))
    assert [f["search_p_value"] for f in one["candidates"]] == [f["search_p_value"] for f in other["candidates"]]
    assert one["overlap"] == pytest.approx(other["overlap"], abs=0 if rtol < 1e-9 else 0.05)


def same_test(one, other):
    one, other = (run / "test/demo_qa" for run in (one, other))
    assert (one / "outcomes.jsonl").read_text() == (other / "outcomes.jsonl").read_text()
    metrics = [json.loads((test / "metrics.json").read_text()) for test in (one, other)]
    # The mark tells fits apart that differ in a last digit, as the order of additions makes them.
    assert all(some.pop("fit") for some in metrics)
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_two_processes_equal_one(reference, tmp_path):
    cli(*FIT, *TWO, cwd=tmp_path)
    same_fit(reference, tmp_path / "checkpoints/demo")
    forked("test", "--ckpt_path", "checkpoints/demo/last.ckpt", *TWO, cwd=tmp_path, ranks=2)
    same_test(reference, tmp_path / "checkpoints/demo")


@pytest.mark.slow
def test_torchrun_equals_one_process(reference, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "corrsteer_pl", *FIT, *TWO]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    same_fit(reference, tmp_path / "checkpoints/demo")


@pytest.mark.slow
def test_two_nodes_equal_one_process(reference, tmp_path):
    nodes = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    forked(*FIT, *nodes, cwd=tmp_path, ranks=2, nodes=2)
    same_fit(reference, tmp_path / "checkpoints/demo")


def interrupted(folder, how, seconds_after_first_checkpoint, *options):
    """Start a fit that saves at every step, and end it shortly after its first checkpoint."""
    fit = Command(*FIT, "--results.every_n_train_steps=1", *options, cwd=folder, ranks=2 if options else 1)
    last = Path(folder) / "checkpoints/demo/last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists():
        assert fit.is_running(), "the fit ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(seconds_after_first_checkpoint)
    fit.send(how)
    assert set(fit.wait(60)) == {-how if how == signal.SIGKILL else 128 + how}
    return torch.load(last, weights_only=True)["corrsteer_pl"]["counted"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "delay", "before", "after"),
    [
        (signal.SIGKILL, 0.0, [], []),
        (signal.SIGTERM, 0.3, [], []),
        (signal.SIGINT, 0.3, [], []),
        (signal.SIGKILL, 0.2, TWO, []),
        (signal.SIGKILL, 0.1, TWO, TWO),
        (signal.SIGTERM, 0.3, [], ["--data.batch_size", "5"]),
    ],
    ids=[
        "kill",
        "term",
        "interrupt",
        "kill two, resume on one",
        "kill two, resume on two",
        "term, go on in other batches",
    ],
)
def test_a_killed_fit_goes_on_where_it_was(reference, tmp_path, how, delay, before, after):
    counted = interrupted(tmp_path, how, delay, *before)
    assert 0 < counted < 101
    forked(*FIT, "--ckpt_path", "last", *after, cwd=tmp_path, ranks=2 if after == TWO else 1)
    # Activations are float32, and other batches round otherwise.
    rounding = {"rtol": 1e-5, "atol": 1e-4} if "--data.batch_size" in after else {}
    same_fit(reference, tmp_path / "checkpoints/demo", **rounding)


@pytest.mark.slow
def test_a_fit_killed_in_validation_selects_the_same(reference, tmp_path):
    run_here(*FIT, cwd=tmp_path)
    last = tmp_path / "checkpoints/demo/last.ckpt"
    # What is on disk when the last step has been saved and validation has not ended.
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["corrsteer_pl"]["state"] |= {"selection": None, "directions": {}, "snapshots": []}
    torch.save(checkpoint, last)
    run_here(*FIT, "--ckpt_path", "last", cwd=tmp_path)
    same_fit(reference, tmp_path / "checkpoints/demo")


@pytest.mark.slow
def test_one_mistake_is_told_once_by_two_processes(tmp_path):
    done = cli(*FIT, *TWO, "--model.layers=[9]", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert done.stderr.count("layer 9 is not in demo") == 1
    assert "Traceback" not in done.stderr


PYTHON_DDP = """
from lightning.pytorch import Trainer
from corrsteer_pl import CorrSteer, TaskDataModule
if __name__ == "__main__":
    module = CorrSteer("demo", "demo", rule="greedy", layers=[1, 2], permutations=19)
    trainer = Trainer(strategy="{strategy}", devices=2, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.fit(module, datamodule=TaskDataModule(train_size=101, val_size=33, batch_size=1))
    if trainer.is_global_zero:
        print("SELECTED", [(f.layer, f.index) for f in module.selection.features], module.selection.samples)
"""


OWN_REWARD = """
import os
from corrsteer_pl.rewards import reward

@reward
def failing(text, gold):
    if os.environ.get("LOCAL_RANK", "0") == os.environ["FAILS"]:
        raise ValueError("it broke")
    failing.calls = getattr(failing, "calls", 0) + 1
    return failing.calls % 2
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_mistake_on_any_process_is_told_once_and_ends_all(tmp_path, rank):
    (tmp_path / "mine.py").write_text(OWN_REWARD, encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", [{"q": f"Request: sing {i} songs", "a": "x"} for i in range(80)])
    task = '{prompt: "{q}", answer: a, reward: mine.failing, max_new_tokens: 2}'
    data = ["--data.task=generic", "--data.path=rows.jsonl", f"--data.task_args={task}", "--data.batch_size=4"]
    done = forked(
        "fit", "--model.llm=demo", "--model.saes=demo", *data, *TWO, "--trainer.enable_progress_bar=false",
        cwd=tmp_path, ranks=2, check=False, env={"FAILS": rank},
    )  # fmt: skip
    assert done.wait() == [2, 2]
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: the reward mine.failing")
    assert "it broke" in done.stderr


@pytest.mark.slow
def test_plain_ddp_from_python_works(reference, tmp_path):
    (tmp_path / "run.py").write_text(PYTHON_DDP.format(strategy="ddp"))
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = json.loads((reference / "selection.json").read_text())
    assert f"SELECTED {[(f['layer'], f['index']) for f in expected['features']]} 101" in done.stdout
    assert list(tmp_path.glob("checkpoints/*.ckpt")), "Lightning's own checkpoint is missing"


def peak_memory(folder, options, peaks):
    """Of a process of its own, in kB."""
    run_here(*options, cwd=folder)
    peaks.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_samples(tmp_path):
    requests = read_rows(demo.DATA / "demo_refusal" / "train.jsonl")
    rows = [{**row, "prompt": f"{row['prompt']} {i}", "id": i} for i, row in enumerate(requests * 5)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    peaks, queue = [], FORKS.Queue()
    for size in (500, 5000):
        options = [
            "fit", "--config", "demo.yaml", "--data.task=refusal", "--data.path=rows.jsonl",
            f"--data.train_size={size}", "--data.val_size=8", "--data.test_size=8",
            "--data.task_args={max_new_tokens: 4}", "--trainer.enable_progress_bar=false",
        ]  # fmt: skip
        process = FORKS.Process(target=peak_memory, args=(tmp_path, options, queue), daemon=True)
        process.start()
        peaks.append(queue.get(timeout=240))
        process.join()
    # In kB: 4,500 rows take about 10,000, what they activate in three layers would take 28,000.
    assert peaks[1] < peaks[0] + 24_000


@pytest.mark.slow
def test_fits_at_once_in_one_folder_all_end_well(tmp_path):
    fits = [Command(*FIT, "--results.every_n_train_steps=1", cwd=tmp_path) for _ in range(3)]
    assert [(fit.wait(), fit.stderr) for fit in fits] == [([0], "")] * 3
    run = tmp_path / "checkpoints/demo"
    assert read_checkpoint(run / "last.ckpt")["corrsteer_pl"]["counted"] == 101
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml", "features.json", "last.ckpt", "logs", "selection.json", "steering.safetensors",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["paper", "authors"])
def test_two_processes_train_an_adapter_as_one_does_with_twice_the_batch(loss, tmp_path):
    small = ["--data.train_size=150", "--data.val_size=16", "--trainer.enable_progress_bar=false"]
    fit = ["fit", "--config", "demo_crisp.yaml", f"--model.loss={loss}", *small]
    run_here(*fit, "--data.batch_size=16", "--trainer.default_root_dir=one", cwd=tmp_path)
    forked(*fit, "--data.batch_size=8", *TWO, "--trainer.default_root_dir=two", cwd=tmp_path, ranks=2)
    curves = []
    for run in ("one", "two"):
        rows = read_rows(tmp_path / run / "logs/version_0/metrics.csv")
        curves.append([float(row["train/loss"]) for row in rows if row["train/loss"]])
    # 150 samples in steps of 16: the last one has fillers, on the second process alone.
    assert len(curves[0]) == 10
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    one, two = (json.loads((tmp_path / run / "selection.json").read_text(encoding="utf-8")) for run in ("one", "two"))
    assert [f["index"] for f in one["features"]] == [f["index"] for f in two["features"]]
