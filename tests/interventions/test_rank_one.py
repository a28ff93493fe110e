"""Rank-one edits: as weights, as hooks, and undone."""

from types import SimpleNamespace

import pytest
import torch

from corrsteer_pl.errors import UserError
from corrsteer_pl.interventions.edited import EditedWeights, EditRecord
from corrsteer_pl.interventions.rank_one import Edit, EditedOutputs, alpha_of_one, warn_of_centred
from corrsteer_pl.interventions.switched import Switched
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.llm import positions_of
from corrsteer_pl.models.writers import mean_share, writers
from tests.architectures import PROMPTS, WIDTH, make_tiny

FORMS = ["row_mean", "projection"]
KINDS = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox"]


def edit_of(width, strength=8.0, form="projection", seed=0):
    direction = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Edit(torch.nn.functional.normalize(direction, dim=0), strength, form)


@pytest.fixture(scope="module")
def tiny(llm):
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = make_tiny(kind, llm.tokenizer)
        return made[kind]

    return make


def logits(llm, change=None):
    ids, mask = llm.left_pad(PROMPTS)
    with torch.no_grad():
        if change is None:
            return llm.forward(ids, mask, positions_of(mask))[:, 0]
        with change.attached(llm.model):
            return llm.forward(ids, mask, positions_of(mask))[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_two_matrices_of_every_block_write(kind, tiny):
    found = writers(tiny(kind).model)
    assert len(found) == 2 * 3
    assert all(writer.matrix.shape[0] == WIDTH for writer in found)
    # GPT-2 stores the transpose, and its attention writes with a square matrix.
    x = torch.randn(2, found[0].matrix.shape[1])
    module = found[0].module
    torch.testing.assert_close(found[0].written(module(x)), x @ found[0].matrix.T)


@pytest.mark.parametrize("form", FORMS)
def test_a_change_has_rank_one_and_the_norm_that_was_asked_for(form, tiny):
    for writer in writers(tiny("llama").model):
        change = edit_of(WIDTH, 3.0, form).change(writer.matrix).double()
        sizes = torch.linalg.svdvals(change)
        assert sizes[1] < 1e-6 * sizes[0]
        assert (change.norm() / writer.matrix.double().norm()).item() == pytest.approx(0.03, rel=1e-5)


def test_the_papers_form_adds_the_mean_of_the_output_along_the_direction(tiny):
    (writer, *_), edit = writers(tiny("llama").model), edit_of(WIDTH, 5.0, "row_mean")
    x = torch.randn(7, writer.matrix.shape[1])
    alpha = edit.alpha(writer.matrix)
    y = x @ writer.matrix.T
    expected = y + alpha * y.mean(-1, keepdim=True) * edit.direction
    torch.testing.assert_close(x @ (writer.matrix + edit.change(writer.matrix)).T, expected, rtol=1e-4, atol=1e-4)
    other = edit_of(WIDTH, 5.0, "projection")
    expected = y + other.alpha(writer.matrix) * (y @ edit.direction).unsqueeze(-1) * edit.direction
    torch.testing.assert_close(x @ (writer.matrix + other.change(writer.matrix)).T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_rows_give_what_edited_weights_give(kind, form, tiny):
    llm = tiny(kind)
    edits = [None, edit_of(WIDTH, 8.0, form), edit_of(WIDTH, 30.0, form, seed=1)]
    ids, mask = llm.left_pad(PROMPTS)
    ids, mask = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    with torch.no_grad(), EditedOutputs(llm.model, edits).attached(llm.model):
        found = llm.forward(ids, mask, positions_of(mask))[:, 0]
    for variant, edit in enumerate(edits):
        changed = edit and Switched([("an edit", EditedWeights(llm.model, edit).applied)])
        expected = logits(llm, changed)
        scale = expected.abs().max()
        torch.testing.assert_close(found[variant::3] / scale, expected / scale, rtol=0, atol=2e-4)
        if edit:
            assert (expected - logits(llm)).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_a_grid_generates_what_each_edited_model_generates_alone(kind, tiny):
    llm = tiny(kind)
    edits = [None, edit_of(WIDTH, 8.0), edit_of(WIDTH, 30.0, seed=1)]
    ids, mask = llm.left_pad(PROMPTS)
    prompts, decoder = SimpleNamespace(input_ids=ids, attention_mask=mask), Decoder(llm, 6)
    together = decoder.compare(prompts, EditedOutputs(llm.model, edits))
    alone = []
    for edit in edits:
        with EditedWeights(llm.model, edit or edit_of(WIDTH, 0.0)).applied():
            alone.append(decoder.generate(prompts))
    assert together == alone
    one_by_one = Switched([None, *(("an edit", EditedWeights(llm.model, edit).applied) for edit in edits[1:])])
    assert decoder.compare(prompts, one_by_one) == together


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_changes_no_bit_and_undoing_restores_every_one(kind, dtype, llm):
    other = make_tiny(kind, llm.tokenizer)
    other.model.to(dtype)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    EditedWeights(other.model, edit_of(WIDTH, 0.0)).apply()
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    weights = EditedWeights(other.model, edit_of(WIDTH, 8.0))
    weights.apply()
    changed = [name for name, value in other.model.state_dict().items() if not torch.equal(value, before[name])]
    assert sorted(changed) == sorted(f"{writer.name}.weight" for writer in writers(other.model))
    weights.undo()
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())


def test_a_record_is_applied_once_and_to_its_own_model(llm):
    own, other = make_tiny("llama", llm.tokenizer), make_tiny("qwen3", llm.tokenizer)
    record = EditRecord.of(edit_of(WIDTH), own)
    assert record.before == own.identity["fingerprint"] != record.after
    record = EditRecord.from_dict(record.as_dict())
    with pytest.raises(UserError, match="the edit was made for .* but .* has other weights"):
        record.apply(other)
    weights = record.apply(own)
    assert own.identity["fingerprint"] == record.after
    with pytest.raises(UserError, match="has this edit already. Apply it once"):
        record.apply(own)
    weights.undo()
    own.__dict__.pop("identity")
    assert own.identity["fingerprint"] == record.before
    for writer in writers(own.model):
        assert record.alphas[writer.name] == record.edit.alpha(writer.matrix)


def test_centred_matrices_are_told_and_left_alone(llm):
    other = make_tiny("llama", llm.tokenizer)
    for writer in writers(other.model):
        writer.matrix.sub_(writer.matrix.mean(0, keepdim=True))
    with pytest.warns(UserWarning, match="6 of 6 matrices .* are mean-centred .* has .*e-.* of its norm.*projection"):
        warn_of_centred(other.model, "row_mean")
    matrix = writers(other.model)[0].matrix
    assert mean_share(matrix) < 1e-6
    assert edit_of(WIDTH, 8.0, "row_mean").change(matrix).abs().max() == 0
    assert alpha_of_one(matrix, edit_of(WIDTH).direction, "projection") > 0


def test_models_that_are_not_centred_are_not_warned_of(llm):
    warn_of_centred(llm.model, "row_mean")
    assert mean_share(torch.randn(576, 64)) == pytest.approx(576**-0.5, rel=0.3)


def test_quantised_weights_and_unknown_blocks_are_refused(llm):
    other = make_tiny("llama", llm.tokenizer)
    other.model.is_quantized = True
    with pytest.raises(UserError, match="are quantised, and cannot be edited"):
        writers(other.model)
    other.model.is_quantized = False
    other.model.model.layers[1].mlp = torch.nn.ModuleList()
    with pytest.raises(UserError, match="the matrix by which the MLP of LlamaForCausalLM writes .* is not known"):
        writers(other.model)


def test_an_mlp_on_the_block_itself_has_no_rows_to_edit(llm):
    other = make_tiny("opt", llm.tokenizer)
    with pytest.raises(UserError, match=r"the MLP of OPTForCausalLM .* is not known \(none of mlp, .* in OPTDecoder"):
        EditedOutputs(other.model, [None])
    assert [writer.name for writer in writers(other.model, on_block=True)][1] == "model.decoder.layers.0.fc2"


def test_variants_of_the_weights_share_no_forward_pass(llm):
    switched = Switched([None, None])
    with pytest.raises(ValueError, match="cannot share a forward pass"):
        list(switched.groups(2))
    with pytest.raises(ValueError, match="cannot share a forward pass"), switched.attached(llm.model):
        pass
