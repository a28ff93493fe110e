"""Log-likelihoods of options, against plain forward passes of Hugging Face models."""

import pytest
import torch

from corrsteer_pl.errors import UserError
from corrsteer_pl.interventions.rank_one import Edit, EditedOutputs
from corrsteer_pl.interventions.steering import POSITIONS, Schedule, SteeringVectors
from corrsteer_pl.interventions.switched import Switched
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.decoding.kept import KeptPrompts
from tests.architectures import PROMPTS, WIDTH, batch_of, hf_log_likelihood, make_tiny, vectors

OPTIONS = [[[40, 41, 42], [43]], [[5], [6, 7], [8, 9, 10, 11]], [[300, 2]], [[12, 13], [12, 14]]]


def naive(llm, prompt, option):
    """The sum of log-probabilities by one forward pass of the whole sequence, without a cache."""
    ids = torch.tensor([prompt + option])
    log_p = llm.model(ids).logits[0].double().log_softmax(-1)
    return sum(log_p[len(prompt) + i - 1, token].item() for i, token in enumerate(option))


def test_likelihoods_are_those_of_plain_forward_passes(tiny):
    found = Decoder(tiny, 1).log_likelihoods(batch_of(tiny), OPTIONS, Switched([None]))
    for prompt, options, nats in zip(PROMPTS, OPTIONS, found, strict=True):
        assert nats.shape == (1, len(options))
        expected = [naive(tiny, prompt, option) for option in options]
        torch.testing.assert_close(nats[0], torch.tensor(expected).double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_variant_is_steered_at_each_step_of_every_option(tiny, positions):
    many, schedule = [{}, vectors(), vectors((1,), seed=1)], Schedule(positions, first_k=2, decay=0.9)
    for size in (1, 2, 3):
        decoder = Decoder(tiny, 1, candidate_batch_size=size)
        found = decoder.log_likelihoods(batch_of(tiny), OPTIONS, SteeringVectors.stack(many, schedule))
        for prompt, options, nats in zip(PROMPTS, OPTIONS, found, strict=True):
            for variant, steered in enumerate(many):
                own = SteeringVectors(steered, schedule)
                expected = [hf_log_likelihood(tiny, prompt, option, own) for option in options]
                torch.testing.assert_close(nats[variant], torch.tensor(expected).double(), rtol=2e-3, atol=2e-3)


def test_edits_and_batches_change_nothing_else(llm):
    direction = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(0)), dim=0)
    edit = Edit(direction, 8.0, "row_mean")
    variants, decoder = EditedOutputs(llm.model, [None, edit]), Decoder(llm, 1)
    together = decoder.log_likelihoods(batch_of(llm), OPTIONS, variants)
    for prompt, options, nats in zip(PROMPTS, OPTIONS, together, strict=True):
        (alone,) = decoder.log_likelihoods(batch_of(llm, [prompt]), [options], variants)
        torch.testing.assert_close(nats, alone, rtol=1e-4, atol=1e-4)
        plain = torch.tensor([naive(llm, prompt, option) for option in options]).double()
        torch.testing.assert_close(nats[0], plain, rtol=1e-4, atol=1e-4)
        with variants.attached(llm.model):
            # Rows stand side by side: the unchanged model, and the edited one.
            ids = torch.tensor([prompt + options[0]] * 2)
            log_p = llm.model(ids).logits[1].double().log_softmax(-1)
        edited = sum(log_p[len(prompt) + i - 1, token].item() for i, token in enumerate(options[0]))
        assert nats[1, 0].item() == pytest.approx(edited, abs=1e-3)
        assert nats[1, 0].item() != pytest.approx(nats[0, 0].item(), abs=1e-3)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_options_cross_a_sliding_window(name, llm):
    model, prompts = make_tiny(name, llm.tokenizer), [[1, 17, 250, 33, 9], [1, 400]]
    options = [[[40 + i for i in range(length)] for length in lengths] for lengths in ((2, 6, 20), (8,))]
    found = Decoder(model, 1).log_likelihoods(batch_of(model, prompts), options, Switched([None]))
    for prompt, some, nats in zip(prompts, options, found, strict=True):
        expected = [naive(model, prompt, option) for option in some]
        torch.testing.assert_close(nats[0], torch.tensor(expected).double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_short_option_beside_a_long_one_stays_in_the_context(name, llm):
    model = make_tiny(name, llm.tokenizer)
    prompts = [[1, *range(100, 223)], [1, 5]]
    options = [[[7, 8, 9, 10]], [list(range(20, 40))]]
    found = Decoder(model, 1).log_likelihoods(batch_of(model, prompts), options, Switched([None]))
    for prompt, (option,), nats in zip(prompts, options, found, strict=True):
        assert nats.item() == pytest.approx(naive(model, prompt, option), rel=1e-4)


def test_prompts_that_are_kept_are_not_read_again(llm, monkeypatch):
    kept, batch, decoder = KeptPrompts(10**9), batch_of(llm), Decoder(llm, 1)
    variants = SteeringVectors.stack([{}, vectors(width=128)])
    first = decoder.log_likelihoods(batch, OPTIONS, variants, kept)
    monkeypatch.setattr(Decoder, "_prefill", lambda *_, **__: pytest.fail("read again"))
    for one, other in zip(first, decoder.log_likelihoods(batch, OPTIONS, variants, kept), strict=True):
        assert torch.equal(one, other)


def test_a_vector_that_overflows_is_named(tiny):
    huge = SteeringVectors.stack([{}, {site: torch.full((WIDTH,), 3e38) for site in vectors()}])
    with pytest.raises(UserError, match="steering at .* makes the activations of .* overflow"):
        Decoder(tiny, 1).log_likelihoods(batch_of(tiny), OPTIONS, huge)
