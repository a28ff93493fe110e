"""Pooled activations against a naive loop: one sample, no cache, every position encoded."""

import pytest
import torch
from transformers import GPT2Config

from corrsteer_pl.errors import UserError
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.sae_loading import load_saes
from corrsteer_pl.models.sites import Site, decoder_blocks
from tests.architectures import batch_of
from tests.conftest import make_sae, random_saes

TEXTS = ["Request: bake a loaf of bread\nResponse:", "Request: sing\nResponse:", "Where does"]
NEW = 6


def naive_pools(llm, sae, prompt, generated, kind):
    ids, seen = torch.tensor([prompt + generated]), []
    handle = decoder_blocks(llm.model)[sae.site.layer].register_forward_hook(lambda m, a, out: seen.append(out[0]))
    llm.model(ids, use_cache=False)
    handle.remove()
    activations = sae.sae.encode(seen[0])  # (T, d_sae)
    steps = activations[len(prompt) - 1 : len(prompt) - 1 + len(generated)]
    if kind == "all":
        return torch.cat([activations[1 : len(prompt) - 1], steps]).amax(0)  # BOS left out
    if not generated:
        return torch.zeros(activations.shape[1])
    return steps.amax(0) if kind == "max" else steps.mean(0)


@pytest.mark.parametrize("kind", ["max", "mean", "all"])
@pytest.mark.parametrize("ends", [None, 2])
def test_pools_equal_a_naive_loop(llm, tmp_path, kind, ends):
    saes = load_saes(str(random_saes(tmp_path, [0, 2])), llm)
    prompts = [llm.token_ids(text) for text in TEXTS]
    reader, decoder = PoolReader(saes, [kind]), Decoder(llm, NEW)
    if ends:
        # With every second token for an end, samples end at different steps, and leave.
        decoder.end = torch.arange(0, llm.config.vocab_size, ends)
    batch = batch_of(llm, prompts)
    decoder.generate(batch, reader)
    tokens = decoder._decode(*decoder._prefill(batch))
    assert ends is None or len(tokens.lengths.unique()) > 1
    for layer, sae in saes.items():
        for i, prompt in enumerate(prompts):
            generated = tokens.ids[i, : tokens.lengths[i]].tolist()
            expected = naive_pools(llm, sae, prompt, generated, kind)
            torch.testing.assert_close(reader.pools[layer][kind].value[i], expected, rtol=1e-4, atol=1e-4)


def test_the_step_that_ends_the_sequence_is_left_out(llm, tmp_path):
    saes = load_saes(str(random_saes(tmp_path, [1])), llm)
    prompts = [llm.token_ids("Request: sing\nResponse:")]
    reader, decoder = PoolReader(saes, ["max"]), Decoder(llm, 1)
    decoder.end = torch.arange(llm.config.vocab_size)  # whatever is generated ends the sequence
    assert decoder.generate(batch_of(llm, prompts), reader) == [""]
    assert reader.pools[1]["max"].value.abs().max() == 0


def test_the_last_prompt_token_is_text_even_if_nothing_follows(llm, tmp_path):
    saes = load_saes(str(random_saes(tmp_path, [1])), llm)
    prompt = llm.token_ids("Request: sing\nResponse:")
    reader, decoder = PoolReader(saes, ["all"]), Decoder(llm, 1)
    decoder.end = torch.arange(llm.config.vocab_size)
    decoder.generate(batch_of(llm, [prompt]), reader)
    seen = []
    handle = saes[1].site.hook(llm.model, lambda h: seen.append(h))
    llm.model(torch.tensor([prompt]))
    handle.remove()
    expected = saes[1].encode(seen[0][0, 1:]).amax(0)
    torch.testing.assert_close(reader.pools[1]["all"].value[0], expected, rtol=1e-4, atol=1e-4)


def test_several_pools_share_one_encoding(llm, tmp_path):
    saes = load_saes(str(random_saes(tmp_path, [1])), llm)
    batch = batch_of(llm, [llm.token_ids(text) for text in TEXTS])
    both, alone = PoolReader(saes, ["max", "mean"]), PoolReader(saes, ["mean"])
    Decoder(llm, NEW).generate(batch, both)
    Decoder(llm, NEW).generate(batch, alone)
    assert torch.equal(both.pools[1]["mean"].value, alone.pools[1]["mean"].value)


def test_block_input_is_the_output_of_the_block_before(llm):
    ids, seen = torch.tensor([llm.token_ids(TEXTS[0])]), {}
    handles = [site.hook(llm.model, lambda h, s=site: seen.update({s: h})) for site in
               (Site(1, "resid_post"), Site(2, "resid_pre"))]  # fmt: skip
    hidden = llm.model(ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    assert torch.equal(seen[Site(1, "resid_post")], seen[Site(2, "resid_pre")])
    assert torch.equal(seen[Site(2, "resid_pre")], hidden[2])


def test_the_last_block_is_read_before_the_final_norm(llm):
    last, seen = llm.config.num_hidden_layers - 1, []
    handle = Site(last, "resid_post").hook(llm.model, lambda h: seen.append(h))
    output = llm.model(torch.tensor([llm.token_ids(TEXTS[0])]), output_hidden_states=True)
    handle.remove()
    assert not torch.allclose(seen[0], output.hidden_states[-1])
    torch.testing.assert_close(llm.model.model.norm(seen[0]), output.hidden_states[-1])


def test_blocks_that_return_a_tuple_are_read_and_changed_in_all_rows():
    class Block(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states + 1, "attention"

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = GPT2Config(n_layer=2)
            self.blocks = torch.nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x, _ = block(hidden_states=x)
            return x

    model, x = Model(), torch.zeros(2, 3, 4)
    for kind in ("resid_pre", "resid_post"):
        handle = Site(1, kind).hook(model, lambda h: h * 10)
        assert torch.equal(model(x), torch.full_like(x, 11.0 if kind == "resid_pre" else 20.0))
        handle.remove()


def test_unclear_decoder_blocks_are_refused():
    model = torch.nn.Module()
    model.config = GPT2Config(n_layer=2)
    with pytest.raises(UserError, match="Module has 0 lists of 2 modules, so its decoder blocks are not clear"):
        decoder_blocks(model)


def test_declared_site_decides_and_resid_pre_can_be_forced(llm, tmp_path):
    folder = str(random_saes(tmp_path, [1]))
    assert load_saes(folder, llm)[1].site == Site(1, "resid_post")
    assert load_saes(folder, llm, site="resid_pre")[1].site == Site(1, "resid_pre")


def test_direction_is_what_the_decoder_adds_per_unit(llm):
    for sae in load_saes("demo", llm).values():
        one = torch.zeros(1, sae.d_sae)
        one[0, 7] = 1.0
        torch.testing.assert_close(
            (sae.sae.decode(one) - sae.sae.decode(torch.zeros_like(one)))[0], sae.direction(7), atol=1e-5, rtol=1e-4
        )


def test_bad_sae_folders_are_explained(llm, tmp_path):
    with pytest.raises(UserError, match="do not exist, neither as a folder nor as a release"):
        load_saes(str(tmp_path / "none"), llm)
    with pytest.raises(UserError, match="holds no SAE"):
        load_saes(str(tmp_path), llm)
    random_saes(tmp_path / "some", [0, 1])
    with pytest.raises(UserError, match=r"layer 2 has no SAE in .* \(it has layers 0, 1\)"):
        load_saes(str(tmp_path / "some"), llm, [2])
    with pytest.raises(UserError, match=r"layer 44 is not in demo \(layers 0..3\)"):
        load_saes(str(tmp_path / "some"), llm, [44])
    random_saes(tmp_path / "narrow", [0], d_in=64)
    with pytest.raises(UserError, match="reads width 64, but demo has width 128"):
        load_saes(str(tmp_path / "narrow"), llm)
    random_saes(tmp_path / "twice" / "a", [0])
    random_saes(tmp_path / "twice" / "b", [0])
    with pytest.raises(UserError, match=r"holds 2 SAEs for layer 0 \(a/.*, b/.*\), of which model.sae_id None names 0"):
        load_saes(str(tmp_path / "twice"), llm)
    with pytest.raises(UserError, match="of which model.sae_id 'c' names 0"):
        load_saes(str(tmp_path / "twice"), llm, sae_id="c")
    assert load_saes(str(tmp_path / "twice"), llm, sae_id="b/blocks.{layer}.hook_resid_post")[0].name.startswith("b/")
    assert set(load_saes(str(tmp_path / "some"), llm, sae_id="whatever")) == {0, 1}
    make_sae(tmp_path / "mid", 0, torch.randn(128, 4), torch.randn(4, 128), kind="resid_mid")
    with pytest.raises(
        UserError, match="'blocks.0.hook_resid_mid', which cannot be steered here; supported are blocks"
    ):
        load_saes(str(tmp_path / "mid"), llm)
    next((tmp_path / "some").glob("*.0.*/sae_weights.safetensors")).write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_saes(str(tmp_path / "some"), llm)


def test_a_prompt_that_is_read_for_its_tokens_is_read_whole(llm, tmp_path):
    # Although it begins as its neighbours do.
    saes = load_saes(str(random_saes(tmp_path, [1])), llm)
    prompts = [[1, *range(20, 60), last, last + 1] for last in (70, 80)]
    reader, decoder = PoolReader(saes, ["all"]), Decoder(llm, NEW)
    decoder.generate(batch_of(llm, prompts), reader)
    tokens = decoder._decode(*decoder._prefill(batch_of(llm, prompts)))
    for i, prompt in enumerate(prompts):
        generated = tokens.ids[i, : tokens.lengths[i]].tolist()
        expected = naive_pools(llm, saes[1], prompt, generated, "all")
        torch.testing.assert_close(reader.pools[1]["all"].value[i], expected, rtol=1e-4, atol=1e-4)


def test_a_step_that_reads_bos_is_left_out(llm, tmp_path):
    reader = PoolReader(load_saes(str(random_saes(tmp_path, [1])), llm), ["max", "all"])
    Decoder(llm, 1).generate(batch_of(llm, [[1], [1]]), reader)
    assert all(reader.pools[1][kind].value.abs().max() == 0 for kind in ("max", "all"))
