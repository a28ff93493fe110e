"""Options of the Trainer that it would meet with a traceback, or ignore."""

from datetime import timedelta
from pathlib import Path

import pytest

from corrsteer_pl.cli.program import main
from corrsteer_pl.cli.trainer_options import check_trainer
from corrsteer_pl.errors import UserError

BAD = [
    ("--trainer.accumulate_grad_batches", "0", "trainer.accumulate_grad_batches is 0; it takes a number of batches"),
    ("--trainer.check_val_every_n_epoch", "0", "trainer.check_val_every_n_epoch is 0; it takes a number of epochs"),
    ("--trainer.val_check_interval", "0", "trainer.val_check_interval is 0"),
    ("--trainer.accelerator", "tpu", "trainer.accelerator is 'tpu'; it takes one of auto, cpu, gpu, cuda, mps"),
    ("--trainer.limit_val_batches", "0", "--trainer.limit_val_batches is 0, which leaves nothing to choose by"),
    ("--trainer.max_time", "00:00:00:00", "trainer.max_time is '00:00:00:00'; it takes a time above 0"),
    ("--trainer.max_time", "{minutes: 0}", "trainer.max_time is {'minutes': 0}"),
    ("--trainer.max_time", "soon", "max_time"),
    ("--trainer.default_root_dir", "s3://bucket/run", "it takes a folder on this machine"),
    ("--trainer.default_root_dir", "x" * 300, "each part of its name at most 255 bytes long"),
    ("--trainer.default_root_dir", "/proc/run", "it takes a folder on this machine"),
    ("--seed_everything", str(2**32), "seed_everything is 4294967296; it takes a whole number from 0"),
    ("--seed_everything", "-1", "seed_everything is -1; it takes"),
]


@pytest.mark.parametrize(("option", "value", "sentence"), BAD)
def test_values_that_cannot_be_are_one_sentence(option, value, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "demo.yaml", option, value]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error
    assert not list(tmp_path.iterdir())


def test_values_that_can_be_are_left_alone(tmp_path):
    check_trainer({}, "fit")
    options = {
        "max_time": timedelta(minutes=1),
        "val_check_interval": 0.5,
        "accelerator": "cpu",
        "limit_val_batches": 0,
    }
    check_trainer({**options, "default_root_dir": tmp_path, "seed_everything": True}, "test")
    check_trainer({"max_time": "00:00:00:01", "accumulate_grad_batches": 2, "seed_everything": 0}, "fit")
    with pytest.raises(UserError, match="limit_val_batches is 0"):
        check_trainer(options, "fit")


def test_a_fit_that_ends_early_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--data.train_size=96", "--data.val_size=16", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", "demo.yaml", *small, "--trainer.max_steps=2"]) == 0
    assert "The fit has counted 64 of 96 samples" in capsys.readouterr().out.replace("\n", " ")
    assert main(["fit", "--config", "demo.yaml", *small, "--ckpt_path", "last"]) == 0
    assert "The fit has counted" not in capsys.readouterr().out
    assert Path("checkpoints/demo/selection.json").exists()
