"""SAEs that do not belong to the model, the layer or the site are found out on the first prompts."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from corrsteer_pl import CorrSteer, TaskDataModule, demo
from corrsteer_pl.cli.program import main
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import read_rows
from corrsteer_pl.models.alignment import alignments, judge_alignments
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae_loading import load_saes
from corrsteer_pl.tasks import make_task
from tests.conftest import make_trainer, random_saes

ROWS = read_rows(demo.DATA / "demo_qa/train.jsonl")


def batch_of(llm, count=40):
    prompts = [make_task("demo_qa", {}).example(row, "x").prompt for row in ROWS[:count]]
    ids, mask = llm.left_pad([llm.token_ids(prompt) for prompt in prompts])
    return SimpleNamespace(input_ids=ids, attention_mask=mask)


def moved(folder, shift=0, kind="resid_post", source=demo.SAES):
    """The shipped SAEs, declaring other layers or sites than they were trained on."""
    for config in source.glob("**/cfg.json"):
        settings = json.loads(config.read_text(encoding="utf-8"))
        layer = int(settings["metadata"]["hook_name"].split(".")[1]) + shift
        if 0 <= layer < 4:
            settings["metadata"]["hook_name"] = f"blocks.{layer}.hook_{kind}"
            target = folder / f"layer{layer}"
            shutil.copytree(config.parent, target)
            (target / "cfg.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)


def test_shipped_saes_fit_and_figures_equal_a_naive_computation(llm):
    batch, saes = batch_of(llm), load_saes("demo", llm)
    measured = alignments(llm, saes, batch)
    assert all(fit.problem is None and fit.better is None for fit in measured.values())
    tokens = []
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        hidden = llm.model(ids[mask.bool()][None], output_hidden_states=True).hidden_states[3][0]  # output of block 2
        tokens.append(hidden[1:])
    x = torch.cat(tokens)[:256]
    activations = saes[2].sae.encode(x)
    unexplained = (x - saes[2].sae.decode(activations)).var(0, unbiased=False).sum()
    error = (x - saes[2].sae.decode(activations)).square().mean(0).sum()
    assert unexplained <= error
    assert measured[2].explained == pytest.approx(1 - (error / x.var(0, unbiased=False).sum()).item(), abs=1e-4)
    assert measured[2].l0 == pytest.approx((activations > 0).sum(-1).float().mean().item(), abs=0.05)


@pytest.mark.parametrize(
    ("shift", "kind", "where"),
    [(1, "resid_post", "blocks.0.hook_resid_post"), (-1, "resid_post", "blocks.1.hook_resid_post"),
     (0, "resid_pre", "blocks.0.hook_resid_post"), (0, "attn_out", "resid_post"), (0, "mlp_out", "resid_post")],
)  # fmt: skip
def test_a_wrong_layer_or_site_is_named_with_the_right_one(llm, tmp_path, shift, kind, where):
    measured = alignments(llm, load_saes(moved(tmp_path, shift, kind), llm), batch_of(llm))
    with pytest.raises(UserError, match=r"explains .* % of the variance at blocks.* but \d+ % at blocks") as raised:
        judge_alignments(measured.values(), "error")
    assert where in str(raised.value)
    assert "so the layer or the site is wrong" in str(raised.value)
    with pytest.warns(UserWarning, match="so the layer or the site is wrong"):
        judge_alignments(measured.values(), "warn")


def test_another_models_saes_and_scaled_ones_are_found_out(llm, tmp_path):
    measured = alignments(llm, load_saes(str(random_saes(tmp_path / "random", [1])), llm), batch_of(llm))
    with pytest.raises(UserError, match="it was probably trained on another model, or on activations that were scaled"):
        judge_alignments(measured.values(), "error")
    torch.manual_seed(1)
    other = LanguageModel.load("demo")
    for parameter in other.model.parameters():
        parameter.copy_(parameter[torch.randperm(len(parameter))])
    measured = alignments(other, load_saes("demo", other), batch_of(other))
    assert all(fit.is_certain for fit in measured.values())


def test_a_fit_stops_warns_or_does_not_look(tmp_path):
    saes = moved(tmp_path, 1)
    data = {"train_size": 64, "val_size": 10, "test_size": 10}
    with pytest.raises(UserError, match="Set model.llm, model.saes, model.sae_id and model.site to what belongs"):
        make_trainer().fit(CorrSteer("demo", saes), datamodule=TaskDataModule(**data))
    with pytest.warns(UserWarning, match="so the layer or the site is wrong"):
        make_trainer().fit(CorrSteer("demo", saes, check_alignment="warn"), datamodule=TaskDataModule(**data))
    make_trainer().fit(CorrSteer("demo", saes, check_alignment="off"), datamodule=TaskDataModule(**data))


def test_off_needs_no_quotes_in_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saes = moved(tmp_path / "saes", 1)
    (tmp_path / "off.yaml").write_text(f"model: {{llm: demo, saes: {saes}, check_alignment: off}}\n", encoding="utf-8")
    sizes = ["--data.train_size=64", "--data.val_size=10", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", "off.yaml", *sizes]) == 0
    assert CorrSteer("demo", "demo", check_alignment=False).hparams["check_alignment"] == "off"


def test_a_site_that_the_user_forces_is_a_warning(llm):
    saes = load_saes("demo", llm, [2], site="resid_pre")
    with pytest.warns(UserWarning, match=r"at blocks.2.hook_resid_pre .* % at blocks"):
        judge_alignments(alignments(llm, saes, batch_of(llm)).values(), "error")


def test_doctor_shows_a_misfit_and_exits_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--config", "demo.yaml", "--model.saes", moved(tmp_path / "saes", 1)]) == 2
    shown = capsys.readouterr()
    assert "misfit" in shown.out
    assert "so the layer or the site is wrong" in shown.err
    args = ["doctor", "--config", "demo.yaml", "--model.saes", str(tmp_path / "saes"), "--model.check_alignment"]
    assert main([*args, "off"]) == 0


def scaling_sae(normalize, hook="blocks.1.hook_resid_post", **metadata):
    config = StandardSAEConfig(
        d_in=8, d_sae=24, normalize_activations=normalize, metadata=SAEMetadata(hook_name=hook, **metadata)
    )
    sae = StandardSAE(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in (sae.W_enc, sae.W_dec):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return sae


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_activations_are_in_units_of_the_residual_stream(normalize):
    from corrsteer_pl.models.sae import SparseAutoencoder
    from corrsteer_pl.models.sites import Site

    sae = scaling_sae(normalize)
    site = Site(1, "resid_post")
    wrapped = SparseAutoencoder(site, sae, "x", site, {})
    x = 5 + 3 * torch.randn(6, 8)
    contributions = wrapped.encode(x) @ torch.stack([wrapped.direction(i) for i in range(24)])
    # What the features contribute is the reconstruction less what it is without any feature.
    sae.encode(x)
    with_features = sae.decode(scaling_sae(normalize).encode(x))
    sae.encode(x)
    without = sae.decode(torch.zeros(6, 24))
    torch.testing.assert_close(contributions, with_features - without, rtol=1e-4, atol=1e-3)


def test_a_folder_that_hides_its_scale_is_refused(llm, tmp_path):
    sae = StandardSAE(
        StandardSAEConfig(
            d_in=128, d_sae=8, normalize_activations="expected_average_only_in",
            metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post"),
        )
    )  # fmt: skip
    sae.save_model(tmp_path / "scaled")
    with pytest.raises(UserError, match="trained on scaled activations, and its folder does not say by how much"):
        load_saes(str(tmp_path), llm)
    sae.fold_activation_norm_scaling_factor(2.0)
    sae.save_model(tmp_path / "scaled")
    assert SAE.load_from_disk(tmp_path / "scaled").cfg.normalize_activations == "none"
    assert set(load_saes(str(tmp_path), llm)) == {1}


def test_a_few_tokens_are_no_evidence(llm):
    ids, mask = llm.left_pad([llm.token_ids(f"q{i}") for i in range(10)])
    measured = alignments(llm, load_saes("demo", llm), SimpleNamespace(input_ids=ids, attention_mask=mask))
    assert not any(fit.enough or fit.problem for fit in measured.values())
