"""Weights that rest in main memory; the device is PyTorch's meta device where there is no other."""

import pytest
import torch
from sae_lens import (
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.residency import at_hand, bring
from corrsteer_pl.models.sae import ENCODE_ALONE, SparseAutoencoder, unneeded
from corrsteer_pl.models.sae_loading import load_saes
from corrsteer_pl.models.sites import Site
from tests.conftest import random_saes

META, CPU = torch.device("meta"), torch.device("cpu")
SIZES = {"d_in": 8, "d_sae": 24, "metadata": SAEMetadata(hook_name="blocks.1.hook_resid_post")}
SAES = {
    "standard": lambda: StandardSAE(StandardSAEConfig(**SIZES)),
    "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**SIZES)),
    "gated": lambda: GatedSAE(GatedSAEConfig(**SIZES)),
    "topk": lambda: TopKSAE(TopKSAEConfig(**SIZES, k=4, rescale_acts_by_decoder_norm=False)),
    "topk, rescaled": lambda: TopKSAE(TopKSAEConfig(**SIZES, k=4, rescale_acts_by_decoder_norm=True)),
    "matching pursuit": lambda: MatchingPursuitSAE(MatchingPursuitSAEConfig(**SIZES)),
}


@pytest.fixture(params=SAES)
def sae(request):
    torch.manual_seed(0)
    return SAES[request.param]().eval().requires_grad_(False)


def test_the_decoder_rests_only_where_encoding_does_without_it(sae):
    x = torch.randn(6, 8)
    before = SparseAutoencoder(Site(1, "resid_post"), sae, "", Site(1, "resid_post"), {}).encode(x)
    sae.W_dec.data.fill_(torch.nan)
    after = SparseAutoencoder(Site(1, "resid_post"), sae, "", Site(1, "resid_post"), {}).encode(x)
    assert torch.equal(before, after) is bool(unneeded(sae))


def test_weights_come_for_as_long_as_they_are_needed(sae):
    names = {name for name, _ in sae.named_parameters()}
    before = {name: tensor.clone() for name, tensor in sae.named_parameters()}
    with at_hand(sae, META, without=["W_dec"]):
        assert {name for name, tensor in sae.named_parameters() if tensor.device == META} == names - {"W_dec"}
    sae.register_buffer("scale", torch.ones(3))
    with at_hand(sae, META):
        assert {tensor.device for tensor in [*sae.parameters(), *sae.buffers()]} == {META}
        assert not any(tensor.requires_grad for tensor in sae.parameters())
    with pytest.raises(ZeroDivisionError), at_hand(sae, META):
        _ = 1 / 0
    for name, tensor in sae.named_parameters():
        assert torch.equal(tensor, before[name])
        assert not tensor.requires_grad


def test_nothing_happens_to_weights_that_are_there(sae):
    parameters = dict(sae.named_parameters())
    assert bring(sae, CPU) == []
    with at_hand(sae, CPU):
        assert all(tensor is parameters[name] for name, tensor in sae.named_parameters())


@pytest.mark.parametrize("offload", [True, False])
def test_what_is_loaded_computes_on_its_device_and_rests_in_main_memory(llm, tmp_path, monkeypatch, offload):
    folder = random_saes(tmp_path, [1])
    x = torch.randn(3, llm.config.hidden_size)
    here = load_saes(str(folder), llm, offload=offload)[1]
    expected = here.encode(x)
    monkeypatch.setattr(
        "corrsteer_pl.models.sae_loading.decoder_blocks", lambda model: [torch.nn.Linear(1, 1, device=META)] * 9
    )
    monkeypatch.setattr(type(llm), "device", META)
    there = load_saes(str(folder), llm, offload=offload)[1]
    on_device = {name for name, tensor in there.sae.named_parameters() if tensor.device == META}
    assert on_device == (set() if offload else {name for name, _ in there.sae.named_parameters()} - {"W_dec"})
    encode, during = there.sae.encode, {}

    def watched(inputs):
        during.update({name: tensor.device for name, tensor in there.sae.named_parameters()})
        return encode(inputs)

    there.sae.encode = watched
    encoded = there.encode(x)
    assert {name for name, device in during.items() if device == CPU} == {"W_dec"}
    assert (encoded.device, encoded.shape) == (META, expected.shape)
    assert torch.equal(there.direction(5), here.direction(5))
    assert {n for n, tensor in there.sae.named_parameters() if tensor.device == META} == on_device


def test_every_architecture_that_encodes_alone_is_tried_here():
    assert set(ENCODE_ALONE) <= set(SAES)


@pytest.mark.gpu
def test_offloaded_saes_answer_the_same_on_a_gpu():
    here, there = (CorrSteer("demo", "demo", sae_offload=offload) for offload in (False, True))
    found = []
    for module in (here, there):
        module.llm = LanguageModel.load("demo")
        module.llm.model.cuda()
        saes = module.load_encoders()
        x = torch.randn(3, module.llm.config.hidden_size, generator=torch.Generator().manual_seed(0)).cuda()
        found.append(torch.stack([sae.encode(x) for sae in saes.values()]))
        assert all(sae.sae.W_dec.device == CPU for sae in saes.values())
        assert all((sae.sae.W_enc.device == CPU) is module.hparams["sae_offload"] for sae in saes.values())
    assert torch.equal(*found)
