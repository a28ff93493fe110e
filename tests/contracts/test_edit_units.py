"""One alpha for all matrices: against eq. 6 of ROSI's paper in numpy, as hooks, as weights and as an exported model."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from corrsteer_pl import TaskDataModule
from corrsteer_pl.commands.export import export
from corrsteer_pl.commands.report import report_on
from corrsteer_pl.interventions.edited import EditedWeights, EditRecord
from corrsteer_pl.interventions.rank_one import Edit, EditedOutputs
from corrsteer_pl.methods.rosi import Rosi
from corrsteer_pl.methods.runs.files import RunFiles
from corrsteer_pl.models.llm import positions_of
from tests.architectures import PROMPTS, WIDTH, make_tiny
from tests.conftest import make_trainer

ALPHA = 12.0
NAMES = ("self_attn.o_proj", "mlp.down_proj")


def direction(width):
    vector = torch.randn(width, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.normalize(vector, dim=0)


def by_hand(weight, unit_vector, form):
    """W + alpha * s * mean(W)^T, or W + alpha * s * s^T W, in float64."""
    matrix, s = weight.double().numpy(), unit_vector.double().numpy()
    row = matrix.mean(axis=0) if form == "row_mean" else s @ matrix
    return matrix + ALPHA * np.outer(s, row)


@pytest.mark.parametrize("form", ["row_mean", "projection"])
def test_every_matrix_is_edited_with_the_same_alpha(form, llm):
    tiny = make_tiny("llama", llm.tokenizer)
    s = direction(WIDTH)
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    edit = Edit(s, ALPHA, form, "alpha")
    record = EditRecord.from_dict(EditRecord.of(edit, tiny).as_dict())
    assert set(record.alphas.values()) == {ALPHA}
    weights = record.apply(tiny)
    for name, value in tiny.model.state_dict().items():
        if name.removesuffix(".weight").endswith(NAMES):
            np.testing.assert_allclose(value.double().numpy(), by_hand(before[name], s, form), rtol=0, atol=1e-6)
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name])
    weights.undo()
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("form", ["row_mean", "projection"])
def test_hooks_give_what_the_weights_give(kind, form, llm):
    tiny = make_tiny(kind, llm.tokenizer)
    ids, mask = tiny.left_pad(PROMPTS)

    def logits():
        with torch.no_grad():
            return tiny.forward(ids, mask, positions_of(mask))[:, 0]

    edit = Edit(direction(WIDTH), ALPHA if form == "row_mean" else 1.0, form, "alpha")
    plain = logits()
    with EditedOutputs(tiny.model, [edit]).attached(tiny.model):
        hooked = logits()
    with EditedWeights(tiny.model, edit).applied():
        edited = logits()
    scale = edited.abs().max()
    torch.testing.assert_close(hooked / scale, edited / scale, rtol=0, atol=2e-4)
    assert (edited - plain).abs().max() > 1e-3 * scale


def test_records_from_before_there_was_a_unit_are_read(llm):
    tiny = make_tiny("llama", llm.tokenizer)
    plain = EditRecord.of(Edit(direction(WIDTH), 3.0, "projection"), tiny).as_dict()
    del plain["edit"]["unit"]
    assert EditRecord.from_dict(plain).edit.unit == "percent"
    plain["edit"]["unit"] = "grams"
    with pytest.raises(ValueError, match="grams"):
        EditRecord.from_dict(plain)


def test_a_fit_is_exported_with_one_alpha(tmp_path):
    module = Rosi("demo", form="row_mean", unit="alpha", strengths=[16.0, 32.0, 256.0], topm=1, layers=[2])
    data = TaskDataModule("demo_refusal", train_size=96, val_size=48, test_size=40)
    trainer = make_trainer(callbacks=[RunFiles()], enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    assert module.metrics["groups"]["harmful"]["difference"] > 0.2
    stored = json.loads((tmp_path / "edit.json").read_text(encoding="utf-8"))
    assert stored["edit"]["unit"] == "alpha"
    assert set(stored["alphas"].values()) == {stored["edit"]["strength"]} == {32.0}
    export(tmp_path, "merged", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    s, row = module.record.edit.direction.double().numpy(), module.llm.model.state_dict()
    for name, value in row.items():
        if name.removesuffix(".weight").endswith(NAMES):
            matrix = value.double().numpy()
            expected = matrix + 32.0 * np.outer(s, matrix.mean(axis=0))
            np.testing.assert_allclose(merged[name].double().numpy(), expected, rtol=0, atol=1e-5)
    report_on([tmp_path])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<dt>alpha</dt>" in page
    assert "% of the weights" not in page
