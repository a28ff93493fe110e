import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, GenerationConfig

from corrsteer_pl.errors import UserError
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.decoding import decode
from corrsteer_pl.models.decoding.decode import Decoder, budget
from corrsteer_pl.models.llm import LanguageModel, positions_of
from corrsteer_pl.models.sites import Site, decoder_blocks, name_blocks
from tests.architectures import GROUPED, NEW, PROMPTS, WIDTH, batch_of, hf_texts, make_tiny, vectors


def test_unsteered_text_equals_hugging_face(tiny):
    batch = batch_of(tiny)
    expected = hf_texts(tiny, batch)
    assert Decoder(tiny, NEW).generate(batch) == expected
    assert len(set(expected)) > 1, "the model says the same to everything, so equality would mean little"


@pytest.mark.parametrize("kind", ["resid_post", "resid_pre"])
@pytest.mark.parametrize(
    "schedule", [Schedule(), Schedule("all"), Schedule("prompt_last"), Schedule("first_k", 3), Schedule(decay=0.7)]
)
def test_steered_text_equals_hugging_face_with_the_same_hooks(tiny, kind, schedule):
    batch, added = batch_of(tiny), vectors(kind=kind)
    with SteeringVectors(added, schedule).attached(tiny.model):
        expected = hf_texts(tiny, batch)
    unsteered, steered = Decoder(tiny, NEW).compare(batch, SteeringVectors.stack([{}, added], schedule))
    assert steered == expected
    assert unsteered == hf_texts(tiny, batch)
    assert steered != unsteered


def test_steering_generated_positions_equals_a_naive_full_forward(tiny):
    # An independent reference: no cache, no padding, one token at a time, vectors added by mask.
    added = vectors()
    _, steered = Decoder(tiny, 5).compare(batch_of(tiny), SteeringVectors.stack([{}, added], Schedule()))
    for prompt, text in zip(PROMPTS, steered, strict=True):
        ids = list(prompt)
        for _ in range(5):
            handles = [
                decoder_blocks(tiny.model)[site.layer].register_forward_hook(adding(vector, len(prompt) - 1))
                for site, vector in added.items()
            ]
            ids.append(tiny.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            for handle in handles:
                handle.remove()
            if ids[-1] == 2:
                break
        assert text == tiny.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def adding(vector, start):
    def hook(_module, _args, output):
        hidden = output if torch.is_tensor(output) else output[0]
        hidden = hidden.clone()
        hidden[:, start:] += vector
        return hidden if torch.is_tensor(output) else (hidden, *output[1:])

    return hook


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_variants_decoded_together_equal_variants_alone(tiny, at_once):
    batch, many = batch_of(tiny), [{}] + [vectors((layer,), seed=layer) for layer in (0, 1, 2)]
    together = Decoder(tiny, NEW, candidate_batch_size=at_once).compare(batch, SteeringVectors.stack(many, Schedule()))
    assert len(together) == 4
    for variant, texts in zip(many, together, strict=True):
        with SteeringVectors(variant).attached(tiny.model):
            assert texts == hf_texts(tiny, batch)


def test_padding_and_company_do_not_change_a_text(tiny):
    decoder = Decoder(tiny, NEW)
    together = decoder.generate(batch_of(tiny))
    assert together == [decoder.generate(batch_of(tiny, [prompt]))[0] for prompt in PROMPTS]


def test_logits_change_under_steering_in_every_row(tiny):
    # A block output taken for a tuple would steer the first row alone.
    batch = batch_of(tiny)
    plain = tiny.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    with SteeringVectors(vectors((1,)), Schedule("all")).attached(tiny.model):
        steered = tiny.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert ((plain - steered).abs().amax(dim=(1, 2)) > 1e-3).all()


def test_hooks_leave_no_trace(tiny):
    batch = batch_of(tiny)
    before = tiny.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    Decoder(tiny, 3).compare(batch, SteeringVectors.stack([{}, vectors()], Schedule()))
    with pytest.raises(ZeroDivisionError), SteeringVectors(vectors()).attached(tiny.model):
        _ = 1 / 0
    after = tiny.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(before, after)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())


def test_zero_vectors_give_the_unsteered_text_bit_for_bit(llm):
    batch = batch_of(llm, [llm.token_ids("Where does"), llm.token_ids("Request: sing\nResponse:")])
    zero = vectors(strength=0.0, width=llm.config.hidden_size)
    unsteered, steered = Decoder(llm, 8).compare(batch, SteeringVectors.stack([{}, zero], Schedule()))
    assert unsteered == steered == hf_texts(llm, batch, 8)


def test_decoding_stops_at_the_end_of_sequence(llm):
    texts = [f"Request: {verb} the bread\nResponse:" for verb in ("bake", "steal", "carry")]
    batch = batch_of(llm, [llm.token_ids(text) for text in texts])
    decoder = Decoder(llm, 60)
    assert decoder.generate(batch) == hf_texts(llm, batch, 60)
    tokens = decoder._decode(*decoder._prefill(batch))
    assert tokens.ids.shape[1] < 60
    for row, length in zip(tokens.ids, tokens.lengths, strict=True):
        assert 2 not in row[:length]


def test_restricted_decoding_chooses_among_the_allowed(llm):
    allowed = llm.single_tokens([" A", " B", " C", " D"])
    texts = Decoder(llm, 1, allowed).generate(batch_of(llm, [llm.token_ids("Once upon"), llm.token_ids("x")]))
    assert all(text.strip() in "ABCD" for text in texts)


@pytest.mark.parametrize("prompts", [[[1]], [[5], [400], [7]], [[5, 6], [400]]])
def test_prompts_of_a_token_or_two_can_be_continued(tiny, prompts):
    batch, variants = batch_of(tiny, prompts), SteeringVectors.stack([{}, vectors(), vectors(seed=1)], Schedule())
    expected = hf_texts(tiny, batch)
    assert Decoder(tiny, NEW).generate(batch) == expected
    for at_once in ("auto", 1):
        unsteered, steered, _ = Decoder(tiny, NEW, candidate_batch_size=at_once).compare(batch, variants)
        assert unsteered == expected
        with SteeringVectors(vectors()).attached(tiny.model):
            assert steered == hf_texts(tiny, batch)


def test_two_generations_in_one_context_both_start_at_step_zero(llm):
    batch, first = batch_of(llm, [[1], [1]]), Schedule("prompt_last")
    steering = SteeringVectors(vectors((1,), width=llm.config.hidden_size, strength=9.0), first)
    with steering.attached(llm.model):
        once, again = hf_texts(llm, batch, 4), hf_texts(llm, batch, 4)
    assert once == again != hf_texts(llm, batch, 4)


def test_gradients_are_not_needed_and_caches_are_not_shared(llm):
    batch = batch_of(llm, [llm.token_ids("Where does")])
    decoder = Decoder(llm, 4)
    _, cache = decoder._prefill(batch)
    length = cache.get_seq_length()
    decoder._decode(batch, copy.deepcopy(cache))
    assert cache.get_seq_length() == length


def test_sites_add_up_to_the_residual_stream(tiny):
    if tiny.name == "opt":
        pytest.skip("its MLP is no module, and so no site")
    # Whatever norms a block has: its output is its input plus what attention and MLP write.
    found, kinds = {}, ("resid_pre", "attn_out", "mlp_out", "resid_post")
    handles = [Site(1, kind).hook(tiny.model, lambda h, k=kind: found.update({k: h})) for kind in kinds]
    tiny.model(batch_of(tiny, PROMPTS[:1]).input_ids)
    for handle in handles:
        handle.remove()
    written = found["resid_pre"] + found["attn_out"] + found["mlp_out"]
    torch.testing.assert_close(written, found["resid_post"], rtol=1e-5, atol=1e-4)
    assert found["attn_out"].norm() > 0
    assert found["mlp_out"].norm() > 0


def test_an_mlp_that_is_no_module_is_no_site(llm):
    tiny = make_tiny("opt", llm.tokenizer)
    with pytest.raises(UserError, match="OPTDecoderLayer has none of mlp, .* so its mlp_out is not known"):
        Site(1, "mlp_out").module(tiny.model)


def test_a_vector_added_to_a_part_is_added_to_the_residual_stream(tiny):
    if tiny.name == "opt":
        pytest.skip("its MLP is no module, and so no site")
    # What the MLP writes is added to the block's output alone; so is what parallel attention writes.
    parallel = tiny.name == "gpt_neox"
    batch, texts = batch_of(tiny), []
    for kind in ("resid_post", "mlp_out", *(["attn_out"] if parallel else [])):
        with SteeringVectors(vectors([1], kind)).attached(tiny.model):
            texts.append(hf_texts(tiny, batch))
    assert all(text == texts[0] for text in texts)
    assert texts[0] != hf_texts(tiny, batch)


def test_the_text_part_of_a_model_that_also_sees_is_found(llm):
    # As deep as its vision tower, whose layers are no decoder blocks.
    text = {**GROUPED, "head_dim": 8, "sliding_window": 8}
    vision = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8}, mm_tokens_per_image=4
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    blocks = decoder_blocks(model)
    assert {type(block).__name__ for block in blocks} == {"Gemma3DecoderLayer"}
    seeing = LanguageModel("gemma3", model, llm.tokenizer)
    assert (seeing.config.hidden_size, seeing.config.num_hidden_layers) == (WIDTH, 3)
    batch = batch_of(seeing)
    assert Decoder(seeing, NEW).generate(batch) == hf_texts(seeing, batch)


def test_blocks_that_are_not_found_can_be_named(llm):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = (torch.nn.ModuleList(torch.nn.Identity() for _ in range(2)) for _ in range(2))
            self.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(num_hidden_layers=2))

    model = Twice()
    with pytest.raises(UserError, match="has 2 lists of 2 modules.* Name them .* as one of one, other"):
        decoder_blocks(model)
    with pytest.raises(UserError, match="blocks is .third., which is no list of modules in Twice; there are one"):
        name_blocks(model, "third")
    name_blocks(model, "other")
    assert decoder_blocks(model) is model.other


def test_what_changes_greedy_choices_is_left_out_with_a_warning(llm, tmp_path, recwarn):
    llm.model.save_pretrained(tmp_path)
    llm.tokenizer.save_pretrained(tmp_path)
    LanguageModel.load(str(tmp_path))
    GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, num_beams=1).save_pretrained(tmp_path)
    LanguageModel.load(str(tmp_path))
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]
    GenerationConfig(repetition_penalty=1.05, min_length=3).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="sets repetition_penalty, min_length, which is left out"):
        LanguageModel.load(str(tmp_path))


def test_a_model_with_a_device_map_is_not_moved():
    spread = LanguageModel.load("demo", device_map="cpu")
    assert spread.placed
    assert not LanguageModel.load("demo").placed
    batch = batch_of(spread)
    assert Decoder(spread, 4).generate(batch) == hf_texts(spread, batch, new=4)


def test_every_architecture_with_attention_alone_understands_branches(tiny):
    decoder = Decoder(tiny, NEW)
    decoder.compare(batch_of(tiny), SteeringVectors.stack([{}, vectors()], Schedule()))
    assert tiny.abilities["branches"] is (tiny.name != "qwen3_5")


@pytest.mark.parametrize("kind", ["resid_post", "resid_pre", "attn_out", "mlp_out"])
@pytest.mark.parametrize("schedule", [Schedule(), Schedule("prompt_last"), Schedule("first_k", 3), Schedule(decay=0.7)])
def test_branches_equal_rows(tiny, kind, schedule):
    if tiny.name == "qwen3_5":
        pytest.skip("linear attention has no mask, and so no branches")
    if tiny.name == "opt" and kind == "mlp_out":
        pytest.skip("its MLP is no module, and so no site")
    many = [{}] + [vectors((layer,), kind, seed=layer) for layer in (0, 1, 2)] + [vectors(kind=kind, seed=9)]
    batch, variants = batch_of(tiny), SteeringVectors.stack(many, schedule)
    branches = Decoder(tiny, NEW).compare(batch, variants, branches=True)
    assert branches == Decoder(tiny, NEW).compare(batch, variants, branches=False)
    assert branches == Decoder(tiny, NEW, candidate_batch_size=2).compare(batch, variants, branches=True)
    assert len({tuple(texts) for texts in branches}) > 2


def test_a_model_that_misunderstands_branches_decodes_in_rows(tiny):
    batch, variants = batch_of(tiny), SteeringVectors.stack([{}, vectors()], Schedule())
    expected = Decoder(tiny, NEW).compare(batch, variants)
    forward = tiny.model.forward

    def causal_only(*args, attention_mask=None, **kwargs):
        # As a model does that makes its own mask whatever it is given.
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.ndim == 4):
            attention_mask = None
        return forward(*args, attention_mask=attention_mask, **kwargs)

    causal_only.__signature__ = __import__("inspect").signature(forward)
    tiny.model.forward, tiny.abilities = causal_only, {}
    assert Decoder(tiny, NEW).compare(batch, variants) == expected
    assert tiny.abilities["branches"] is False


def test_a_prefix_that_prompts_share_is_read_once_and_changes_nothing(tiny):
    prefix, generator = [1, *range(20, 60)], torch.Generator().manual_seed(0)
    tails = [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in (3, 9, 1, 6, 2, 5)]
    batches = [batch_of(tiny, [prefix + tail for tail in some]) for some in (tails[:3], tails[3:5], tails[5:])]
    # The last batch shares less with the others than they with each other.
    batches.append(batch_of(tiny, [prefix[:25] + tail for tail in tails]))
    batches.append(batch_of(tiny, PROMPTS))
    seen = []
    handle = tiny.model.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    decoder, variants = Decoder(tiny, NEW), SteeringVectors.stack([{}, vectors()], Schedule())
    for batch in batches:
        assert decoder.generate(batch) == hf_texts(tiny, batch)
        unsteered, steered = decoder.compare(batch, variants)
        assert unsteered == hf_texts(tiny, batch)
        with SteeringVectors(vectors()).attached(tiny.model):
            assert steered == hf_texts(tiny, batch)
    handle.remove()
    if getattr(tiny.config, "sliding_window", None) is None and tiny.name != "qwen3_5":
        assert seen.count(torch.Size([1, len(prefix)])) == 1


def test_variants_share_a_pass_as_far_as_memory_goes(llm, monkeypatch):
    batch, config = batch_of(llm, [[1] * 40] * 5), llm.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    token = 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads) * 4
    for branches, tokens in ((True, NEW), (False, 40 + NEW)):
        least = 5 * tokens * token
        for gibibytes in (1, 4, 16):
            monkeypatch.setattr(decode, "BUDGET", gibibytes * least)
            assert 1 <= Decoder(llm, NEW).together(batch, 53, branches) <= gibibytes
    monkeypatch.setattr(decode, "BUDGET", 2**40)
    assert Decoder(llm, NEW).together(batch, 53, branches=False) == 53
    # As equally many in each pass as may be.
    assert Decoder(llm, NEW, candidate_batch_size=20).together(batch, 53) == 18


def test_a_larger_gpu_takes_more_variants_at_once(monkeypatch):
    for total, expected in ((2**33, 2**30), (80 * 2**30, 5 * 2**30)):
        found = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device, found=found: found)
        assert budget(torch.device("cuda")) == expected
    assert budget(torch.device("cpu")) == 2**30


@pytest.mark.parametrize("tokens", [1, 20, 30])
def test_parts_that_fit_a_processor_say_what_the_whole_batch_says(tiny, monkeypatch, tokens):
    batch, variants = batch_of(tiny), SteeringVectors.stack([{}, vectors()], Schedule())
    expected = Decoder(tiny, NEW).compare(batch, variants)
    monkeypatch.setattr(decode, "CPU_TOKENS", tokens)
    assert Decoder(tiny, NEW).compare(batch, variants) == expected


@pytest.mark.parametrize("tokens", [1, 30, 60, 70, 10**9])
@pytest.mark.parametrize("count", [2, 3])
def test_parts_keep_the_variants_that_change_the_prompt_apart(tiny, monkeypatch, count, tokens):
    monkeypatch.setattr(decode, "CPU_TOKENS", tokens)
    batch, many = batch_of(tiny), [{}, vectors((1,)), vectors((0, 2), seed=1)][:count]
    variants = SteeringVectors.stack(many, Schedule("all"))
    decoder = Decoder(tiny, NEW)
    texts, logits = decoder.compare(batch, variants), decoder.first_logits(batch, variants)
    for variant, said, first in zip(many, texts, logits, strict=True):
        with SteeringVectors(variant, Schedule("all")).attached(tiny.model):
            assert said == hf_texts(tiny, batch)
            expected = torch.stack([tiny.model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
        torch.testing.assert_close(first, expected, atol=1e-3, rtol=1e-3)


def test_rows_have_room_for_themselves_alone(llm, monkeypatch):
    rooms, fill = [], decode.FullCache.fill

    def noted(cache, pairs):
        rooms.append(cache.room)
        return fill(cache, pairs)

    monkeypatch.setattr(decode.FullCache, "fill", noted)
    variants = SteeringVectors.stack([{}] + [vectors(width=llm.config.hidden_size)] * 14, Schedule())
    Decoder(llm, 20).compare(batch_of(llm), variants, branches=False)
    assert rooms
    assert set(rooms) == {20}


def test_prompts_that_come_one_by_one_share_a_prefix_too(llm):
    prefix, tails = [1, *range(20, 60)], ([70, 71], [80], [90, 91, 92], [99])
    read, decoder = [], Decoder(llm, 2)
    handle = llm.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompts = [batch_of(llm, [prefix + tail]) for tail in tails]
    found = [decoder.generate(prompt) for prompt in prompts]
    handle.remove()
    assert found == [hf_texts(llm, prompt, 2) for prompt in prompts]
    # The whole first prompt, and then the prefix; after that what comes behind it.
    assert [tokens for tokens in read if tokens >= len(prefix)] == [len(prefix) + 2, len(prefix)]


def test_the_head_reads_rows_that_lie_side_by_side(llm):
    """A product with strided rows is many times slower in bfloat16."""
    ids = torch.tensor([llm.token_ids("Who feeds the owl?")] * 2)
    seen = []
    hook = llm.model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with hook, torch.no_grad():
        llm.forward(ids, torch.ones_like(ids), positions_of(torch.ones_like(ids)))
    assert seen[0].shape[1] == 1
    assert seen[0].is_contiguous()
