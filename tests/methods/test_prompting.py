"""Prompting as a method: the plain prompt against one with solved examples before it."""

import pytest

from corrsteer_pl import TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.prompting import Prompting
from corrsteer_pl.methods.runs.files import RunFiles
from corrsteer_pl.methods.runs.loading import load_fit
from tests.conftest import make_trainer, run_here

SMALL = {"train_size": 24, "val_size": 8, "test_size": 30}


def test_both_answers_are_those_to_their_own_prompts(tmp_path):
    module, data = Prompting("demo", examples=2), TaskDataModule(**SMALL)
    make_trainer(callbacks=[RunFiles()], enable_checkpointing=True, default_root_dir=tmp_path).fit(
        module, datamodule=data
    )
    shown = data.examples["train"][:2]
    assert module.turns == [turn for example in shown for turn in (example.prompt, example.solution)]
    assert module.selection.joint_reward is not None
    again, tested = Prompting("demo", examples=2), TaskDataModule(**SMALL)
    make_trainer().test(again, datamodule=tested, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    decoder = again.answering.decoder
    for outcome, example in list(zip(again.outcomes, tested.examples["test"], strict=True))[:10]:
        for answer, turns in ((outcome.answer_baseline, []), (outcome.answer_steered, module.turns)):
            ids, mask = again.llm.left_pad([again.llm.prompt_ids([*turns, example.prompt], chat=False)])
            assert decoder.generate(type("P", (), {"input_ids": ids, "attention_mask": mask})) == [answer]
    # As with shots for all prompts of the data module, but for which examples are shown.
    assert again.metrics["changed"] > 0


def test_a_run_is_reported_as_others_are(tmp_path):
    sizes = [f"--data.{name}={value}" for name, value in SMALL.items()]
    quiet = "--trainer.enable_progress_bar=false"
    run_here("fit", "--method=prompting", "--model.llm=demo", "--model.examples=2", quiet, *sizes,
             "--trainer.default_root_dir=run", cwd=tmp_path)  # fmt: skip
    run_here("test", "--ckpt_path=run/last.ckpt", quiet, cwd=tmp_path)
    run_here("report", "run", cwd=tmp_path)
    text = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert "A longer prompt for demo changes the reward on demo_qa from" in text


def test_there_is_no_changed_model_to_hand_on(tmp_path):
    make_trainer(callbacks=[RunFiles()], enable_checkpointing=True, default_root_dir=tmp_path).fit(
        Prompting("demo", examples=1), datamodule=TaskDataModule(**SMALL)
    )
    with pytest.raises(UserError, match="is a fit of prompting, which changes prompts and leaves the model alone"):
        load_fit(tmp_path)


def test_what_cannot_be_asked_is_told():
    with pytest.raises(UserError, match="prompting has nothing to put before prompts"):
        Prompting("demo")
    with pytest.raises(UserError, match="model.examples is -1; it is a number of examples"):
        Prompting("demo", examples=-1)
    with pytest.raises(UserError, match="model.system_message needs a chat template, but prompts are not put into one"):
        make_trainer().fit(Prompting("demo", system_message="Be brief."), datamodule=TaskDataModule(**SMALL))
    with pytest.raises(
        UserError, match="model.examples is 3, but the fit split has 0 examples with a solution to show"
    ):
        make_trainer().fit(Prompting("demo", examples=3), datamodule=TaskDataModule("demo_refusal", **SMALL))
