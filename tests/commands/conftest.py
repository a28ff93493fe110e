"""A run that the commands of a loaded fit are tried on."""

import pytest

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.methods.runs.files import RunFiles
from tests.conftest import make_trainer


@pytest.fixture(scope="session")
def refusing(tmp_path_factory):
    """The folder of a fit that refuses more requests, and its method after a test."""
    folder = tmp_path_factory.mktemp("refusing") / "demo"
    module = CorrSteer("demo", "demo", layers=[1, 2, 3])
    data = TaskDataModule(task="demo_refusal", train_size=300, val_size=60, test_size=20)
    trainer = make_trainer(default_root_dir=folder, enable_checkpointing=True, callbacks=[RunFiles()])
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    assert module.metrics["changed"] > 3
    return folder, module
