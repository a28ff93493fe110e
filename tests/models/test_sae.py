"""What an autoencoder gives away, and what is wrong with one that cannot be used."""

import io
import json

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from corrsteer_pl.errors import UserError
from corrsteer_pl.models.sae import SparseAutoencoder
from corrsteer_pl.models.sae_loading import load_saes
from corrsteer_pl.models.sites import Site
from tests.conftest import random_saes

HOOK = "blocks.1.hook_resid_post"
SITE = Site(1, "resid_post")


def test_a_direction_is_saved_without_the_decoder_that_it_is_a_row_of():
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=64, d_sae=4096, metadata=SAEMetadata(hook_name=HOOK)))
    wrapped = SparseAutoencoder(SITE, sae.requires_grad_(False), "x", SITE, {})
    directions = {str(index): wrapped.direction(index) for index in (5, 9, 4000)}
    file = io.BytesIO()
    torch.save(directions, file)
    assert all(direction.untyped_storage().nbytes() == 64 * 4 for direction in directions.values())
    assert len(file.getvalue()) < 3 * 64 * 4 + 4096  # the zip archive's own entries
    directions["5"].zero_()
    assert sae.W_dec[5].abs().max() > 0


@pytest.mark.parametrize("tensor", ["W_enc", "W_dec", "b_enc", "b_dec"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(llm, tmp_path, tensor, value):
    (file,) = random_saes(tmp_path, [1]).glob("*/sae_weights.safetensors")
    weights = load_file(file)
    weights[tensor].view(-1)[-1] = value
    save_file(weights, file)
    with pytest.raises(
        UserError, match=rf"the SAE {HOOK} has values in {tensor} that are not finite in float32. Set model.saes"
    ):
        load_saes(str(tmp_path), llm)


def test_weights_that_overflow_in_half_precision_are_named(llm, tmp_path):
    (file,) = random_saes(tmp_path, [1]).glob("*/sae_weights.safetensors")
    weights = load_file(file)
    weights["W_dec"][3, 4] = 1e5
    save_file(weights, file)
    assert load_saes(str(tmp_path), llm)
    with pytest.raises(UserError, match="has values in W_dec that are not finite in float16. Set model.saes to others"):
        load_saes(str(tmp_path), llm, dtype="float16")


@pytest.mark.parametrize("k", [-1, 0, 25, "4", 2.5, True, None])
def test_a_topk_autoencoder_keeps_some_of_its_features(llm, tmp_path, k):
    sae = TopKSAE(TopKSAEConfig(d_in=128, d_sae=24, k=24, metadata=SAEMetadata(hook_name=HOOK)))
    sae.save_model(tmp_path / "sae")
    assert load_saes(str(tmp_path), llm)[1].d_sae == 24
    config = tmp_path / "sae/cfg.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "k": k}), encoding="utf-8")
    with pytest.raises(UserError, match=f"the SAE sae keeps k = {k!r} of 24 features; k is a whole number from 1 to"):
        load_saes(str(tmp_path), llm)
