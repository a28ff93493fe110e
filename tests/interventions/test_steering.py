"""Steering vectors: what is refused before it can do harm, in files and on models."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from corrsteer_pl.errors import UserError
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.sites import Site
from tests.architectures import NEW, batch_of, hf_texts, vectors

SITE = Site(1, "resid_post")
SCHEDULE = {"positions": "generated", "first_k": "1", "decay": "1.0"}


def one(value=1.0, width=128, **options):
    return {SITE: torch.full((width,), value, **options)}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_vector_that_is_not_finite_is_refused_before_it_is_attached(value):
    sentence = r"the steering vector at blocks.1.hook_resid_post is not finite. Lower model.scale, or fit again"
    with pytest.raises(UserError, match=sentence):
        SteeringVectors(one(value))
    with pytest.raises(UserError, match=sentence):
        SteeringVectors.stack([{}, one(value)], Schedule())


def test_a_vector_that_overflows_the_models_dtype_is_refused(tiny):
    variants = SteeringVectors.stack([{}, one(7e4, tiny.config.hidden_size)], Schedule())
    Decoder(tiny, 1).compare(batch_of(tiny), variants)
    tiny.model.to(torch.float16)
    with (
        pytest.raises(UserError, match="overflows float16: its largest entry is 7e[+]04. Lower model.scale, or set"),
        variants.attached(tiny.model),
    ):
        pass


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("first_k", 3, 0.5), Schedule("all"), None])
def test_a_saved_file_is_loaded_as_it_was(tmp_path, schedule):
    vectors = {SITE: torch.randn(128), Site(0, "mlp_out"): torch.randn(128)}
    SteeringVectors(vectors, schedule).save(tmp_path / "steering.safetensors")
    loaded = SteeringVectors.load(tmp_path / "steering.safetensors")
    assert loaded.schedule == (schedule or Schedule())
    assert loaded.vectors.keys() == vectors.keys()
    assert all(torch.equal(loaded.vectors[site], vector) for site, vector in vectors.items())


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (torch.full((128,), torch.nan), "at blocks.1.hook_resid_post is not finite"),
        (
            torch.ones(128, dtype=torch.int64),
            "blocks.1.hook_resid_post is int64 of shape .128,., not a vector of float",
        ),
        (torch.ones(2, 128), "is float32 of shape .2, 128., not a vector of floating-point numbers"),
        (torch.tensor(1.0), "is float32 of shape .., not a vector"),
    ],
)
def test_a_file_of_other_tensors_is_one_sentence(tmp_path, tensor, sentence):
    save_file({str(SITE): tensor}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"x.safetensors is no steering file .*{sentence}.*Give a steering.safetens"):
        SteeringVectors.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"format": "pt"}, "its metadata lack positions, first_k, decay"),
        ({"positions": "generated"}, "its metadata lack first_k, decay"),
        ({**SCHEDULE, "positions": "somewhere"}, "model.positions is 'somewhere'; choose one of generated, all"),
        ({**SCHEDULE, "first_k": "x"}, "invalid literal for int.. with base 10: 'x'"),
        ({**SCHEDULE, "first_k": "0"}, "model.first_k is 0; it is a number of tokens"),
        ({**SCHEDULE, "decay": "nan"}, "model.decay is nan; it is a factor above 0"),
        ({**SCHEDULE, "decay": "much"}, "could not convert string to float: 'much'"),
    ],
)
def test_a_file_with_other_metadata_is_one_sentence(tmp_path, metadata, sentence):
    path = tmp_path / "x.safetensors"
    save_file({str(SITE): torch.ones(128)}, path, metadata)
    with pytest.raises(UserError, match=rf"x.safetensors is no steering file .*{sentence}"):
        SteeringVectors.load(path)
    assert SteeringVectors.load(path, Schedule("all")).schedule == Schedule("all")


def test_other_files_are_one_sentence(tmp_path):
    save_file({"lm_head.weight": torch.ones(128)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors is no steering file .*'lm_head.weight'"):
        SteeringVectors.load(tmp_path / "model.safetensors")
    save_file({str(SITE): torch.ones(128), str(Site(2, "resid_post")): torch.ones(64)}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="two.safetensors is no steering file .its vectors have different widths"):
        SteeringVectors.load(tmp_path / "two.safetensors")
    header = json.dumps({str(SITE): {"dtype": "F32", "shape": [128], "data_offsets": [0, 512]}}).encode()
    (tmp_path / "cut.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    for name in ("cut", "missing"):
        with pytest.raises(UserError, match=rf"{name}.safetensors is no steering file"):
            SteeringVectors.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("width", [1, 64])
def test_another_width_is_refused(llm, width):
    sentence = f"at blocks.1.hook_resid_post has width {width}, but LlamaForCausalLM has width 128. Use vectors"
    with pytest.raises(UserError, match=sentence), SteeringVectors(one(width=width)).attached(llm.model):
        pass
    variants = SteeringVectors.stack([{}, one(width=width)], Schedule())
    with pytest.raises(UserError, match=sentence):
        Decoder(llm, 1).compare(batch_of(llm), variants)


def test_too_few_blocks_are_refused(llm):
    deep = SteeringVectors({Site(9, "resid_post"): torch.ones(128)})
    sentence = "have one at blocks.9.hook_resid_post, but LlamaForCausalLM has blocks 0..3. Use vectors that were fitt"
    with pytest.raises(UserError, match=sentence), deep.attached(llm.model):
        pass


@pytest.mark.parametrize("strength", [1e4, 1e10, 1e19, 1e30, 1e37, 1.5e38])
@pytest.mark.parametrize("branches", [True, False])
def test_no_variant_reaches_another_however_strong_it_is(tiny, strength, branches):
    if tiny.name == "qwen3_5" and branches:
        pytest.skip("linear attention has no mask, and so no branches")
    batch = batch_of(tiny)
    strong = {Site(layer, "resid_post"): torch.full((tiny.config.hidden_size,), strength) for layer in (0, 1, 2)}
    variants = SteeringVectors.stack([{}, strong, vectors()], Schedule())
    try:
        unsteered, _, steered = Decoder(tiny, NEW).compare(batch, variants, branches)
    except UserError as error:
        sentence = str(error)
    else:
        sentence = None
    if sentence is not None:
        sites = ", ".join(map(str, strong))
        assert sentence.startswith(f"steering at {sites} makes the activations of {tiny.name} overflow in float32")
        assert strength > 1e10
        return
    assert unsteered == hf_texts(tiny, batch)
    with SteeringVectors(vectors()).attached(tiny.model):
        assert steered == hf_texts(tiny, batch)


@pytest.mark.parametrize("branches", [True, False])
def test_vectors_that_overflow_inside_the_model_are_named(llm, branches):
    strong = {Site(layer, "resid_post"): torch.full((128,), 3e38) for layer in (0, 2)}
    variants = SteeringVectors.stack([{}, vectors(width=128), strong], Schedule())
    sentence = "steering at blocks.0.hook_resid_post, blocks.2.hook_resid_post makes the activations of demo overflow"
    with pytest.raises(UserError, match=sentence):
        Decoder(llm, NEW).compare(batch_of(llm), variants, branches)


class FromSecondToken:
    """Steering that begins with the second token; `ending` lets every steered generation end with its first."""

    changes_prompt, most_together = False, None
    attached_last = None

    def __init__(self, variants):
        self.variants = variants

    def __len__(self):
        return len(self.variants)

    def described(self, variant):
        return self.variants.described(variant)

    def groups(self, size):
        return map(FromSecondToken, self.variants.groups(size))

    def attached(self, model, run=None):
        FromSecondToken.attached_last = self
        add = self.variants._add
        self.variants._add = lambda clock, placed, hidden: add(clock, placed, hidden) if clock.step else None
        return self.variants.attached(model, run)


def test_what_overflows_after_its_end_harms_nobody(llm, monkeypatch):
    # An ended branch is still read until it is dropped.
    strong = {Site(layer, "resid_post"): torch.full((128,), 3e38) for layer in (0, 2)}
    batch, decoder = batch_of(llm), Decoder(llm, NEW)
    decoder.look_every = NEW
    expected, choose = decoder.generate(batch), decoder._choose
    seen = []

    def ending(logits):
        chosen, finite = choose(logits)
        seen.append(bool(finite.all()))
        for variant in range(len(FromSecondToken.attached_last)):
            if FromSecondToken.attached_last.described(variant):
                chosen[:, variant] = decoder.end[0]
        return chosen, finite

    monkeypatch.setattr(decoder, "_choose", ending)
    steering = FromSecondToken(SteeringVectors.stack([{}, strong], Schedule()))
    unsteered, steered = decoder.compare(batch, steering, branches=True)
    assert unsteered == expected
    assert set(steered) == {""}
    assert not all(seen)


def test_an_unsteered_model_that_overflows_says_so(tiny):
    for parameter in tiny.model.parameters():
        parameter.fill_(torch.inf)
    with pytest.raises(UserError, match=f"the activations of {tiny.name} overflow in float32 without any change"):
        Decoder(tiny, 2).generate(batch_of(tiny))
