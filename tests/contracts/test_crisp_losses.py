"""The losses of CRISP against the equations of the paper and the public code, written out in numpy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sae_lens import (
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from corrsteer_pl import TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.crisp import Crisp
from corrsteer_pl.methods.crisp_losses import LOSSES
from corrsteer_pl.models.llm import positions_of
from corrsteer_pl.models.sae import SparseAutoencoder
from corrsteer_pl.models.sites import Site
from tests.conftest import make_trainer

D_MODEL, D_SAE, TOP = 6, 20, 4
SALIENT = [2, 3, 11]
SITE = Site(1, "resid_post")
META = SAEMetadata(hook_name=str(SITE))
KINDS = ("standard", "jumprelu", "topk", "topk_rescaled")


def wrap(sae):
    return SparseAutoencoder(SITE, sae.eval().requires_grad_(False), "test", SITE, {})


def make_sae(kind, d_in=D_MODEL, d_sae=D_SAE, k=TOP):
    sizes = {"d_in": d_in, "d_sae": d_sae, "metadata": META, "dtype": "float64"}
    if kind == "standard":
        sae = StandardSAE(StandardSAEConfig(**sizes))
    elif kind == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**sizes))
    else:
        sae = TopKSAE(TopKSAEConfig(**sizes, k=k, rescale_acts_by_decoder_norm=kind == "topk_rescaled"))
    generator = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    if kind == "jumprelu":
        sae.threshold.data.abs_()
    return wrap(sae)


def tokens(n=12, d_in=D_MODEL):
    generator = torch.Generator().manual_seed(5)
    before = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
    return before, before + 0.6 * torch.randn(n, d_in, generator=generator, dtype=torch.float64)


class Reference:
    """One SAE and the losses in numpy, token by token."""

    def __init__(self, sae):
        weights = {name: parameter.detach().double().numpy() for name, parameter in sae.sae.named_parameters()}
        self.W_enc, self.b_enc, self.b_dec = weights["W_enc"], weights["b_enc"], weights["b_dec"]
        self.cfg, self.threshold = sae.sae.cfg, weights.get("threshold", 0.0)
        rescales = getattr(self.cfg, "rescale_acts_by_decoder_norm", False)
        self.scale = np.sqrt((weights["W_dec"] ** 2).sum(1)) if rescales else 1.0
        self.k = getattr(self.cfg, "k", None)

    def pre(self, x):
        return ((x - self.b_dec * self.cfg.apply_b_dec_to_input) @ self.W_enc + self.b_enc) * self.scale

    def act(self, pre):
        activations = np.where(pre > self.threshold, np.maximum(pre, 0), 0)
        if self.k is not None:
            activations[np.argsort(-pre)[self.k :]] = 0
        return activations

    def paper(self, before, after, salient, lam):
        """Numerator and denominator of the mean over tokens."""
        total = 0.0
        for x in after:
            a = self.act(self.pre(x))
            total += sum(a[i] for i in salient) + lam * sum(a) / len(a)
        return total, len(after)

    def authors(self, before, after, salient, lam):
        values = []
        for x0, x in zip(before, after, strict=True):
            fires, pre = self.act(self.pre(x0)) > 0, self.pre(x)
            lifted = pre.copy()
            for i in salient:
                if fires[i]:
                    lifted[i] += abs(lam * pre.mean())
            values += [value for value in self.act(lifted)[salient] if value > 0]
        return sum(values), len(values)

    def ours(self, before, after, salient, lam):
        total = 0.0
        for x0, x in zip(before, after, strict=True):
            for i in salient:
                # A TopK SAE's salient features are read without the competition of the others.
                fires = self.pre(x0)[i] > np.broadcast_to(self.threshold, self.b_enc.shape)[i] and self.pre(x0)[i] > 0
                pre = self.pre(x)[i]
                active = max(pre, 0) if pre > np.broadcast_to(self.threshold, self.b_enc.shape)[i] else 0
                total += (active + lam * max(pre, 0) * fires) / len(salient)
        return total, len(after)


def measured(loss, sae, before, after, lam, salient=SALIENT):
    total, count = LOSSES[loss].unlearning(sae, torch.tensor(salient), before, after, lam)
    return total / count


@pytest.mark.parametrize("lam", [0.0, 0.5, 30.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_unlearning_term_and_its_gradient_are_those_of_the_equations(loss, kind, lam):
    sae, (before, after) = make_sae(kind), tokens()
    after.requires_grad_()
    value = measured(loss, sae, before, after, lam)
    (gradient,) = torch.autograd.grad(value, after)
    reference = getattr(Reference(sae), loss)
    total, count = reference(before.numpy(), after.detach().numpy(), SALIENT, lam)
    assert total > 0
    # The functions sum in float32.
    assert value.item() == pytest.approx(total / count, rel=1e-5)
    step, expected = 1e-6, np.zeros(after.shape)
    for place in np.ndindex(*after.shape):
        moved = [after.detach().numpy().copy() for _ in range(2)]
        moved[0][place] -= step
        moved[1][place] += step
        low, high = (sums[0] / sums[1] for sums in (reference(before.numpy(), x, SALIENT, lam) for x in moved))
        expected[place] = (high - low) / (2 * step)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


# Four features that read one coordinate each. The thresholds are 1; features 0 and 1 are salient.
#   token 0: before (3, 0, 0, 0), after (2, 0, 5, -3)       feature 0 still fires
#   token 1: before (2, 4, 0, 0), after (0.5, 1.5, 2, 4)    feature 0 has fallen below its threshold, feature 1 fires
# paper, lam 4:   token 0: 2 + 4 * (2 + 5) / 4 = 9, token 1: 1.5 + 4 * (1.5 + 2 + 4) / 4 = 9; mean 9
# authors, lam 4: means before the activation function 1 and 2, so 4 and 8 are added:
#                 token 0: 2 + 4 = 6; token 1: 0.5 + 8 = 8.5 and 1.5 + 8 = 9.5; mean of the three 8
# ours, lam 4:    token 0: (2 + 4 * 2) / 2 = 5; token 1: (4 * 0.5 + 1.5 + 4 * 1.5) / 2 = 4.75; mean 4.875
BEFORE = torch.tensor([[3.0, 0, 0, 0], [2, 4, 0, 0]])
AFTER = torch.tensor([[2.0, 0, 5, -3], [0.5, 1.5, 2, 4]])


def coordinates(threshold=1.0):
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=4, d_sae=4, metadata=META))
    sae.W_enc.data, sae.b_enc.data, sae.b_dec.data = torch.eye(4), torch.zeros(4), torch.zeros(4)
    sae.threshold.data = torch.full((4,), threshold)
    return wrap(sae)


@pytest.mark.parametrize(("loss", "expected"), [("paper", 9.0), ("authors", 8.0), ("ours", 4.875)])
def test_values_by_hand(loss, expected):
    assert measured(loss, coordinates(), BEFORE, AFTER, 4.0, [0, 1]).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_token_whose_feature_has_fallen_silent_keeps_a_gradient(loss):
    after = AFTER.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(measured(loss, coordinates(), BEFORE, after, 4.0, [0]), after)
    if loss == "paper":
        # The token's gradient is that of c_t alone: 4 / 4 for each active feature, over two tokens.
        assert gradient[1].tolist() == [0, 0.5, 0.5, 0.5]
    else:
        assert gradient[1, 0] > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_batches_merge_by_addition(loss):
    sae, (before, after) = make_sae("jumprelu"), tokens(40)
    fn, salient = LOSSES[loss].unlearning, torch.tensor(SALIENT)
    whole = torch.stack(fn(sae, salient, before, after, 3.0))
    parts = [fn(sae, salient, *some, 3.0) for some in zip(before.split(7), after.split(7), strict=True)]
    torch.testing.assert_close(torch.tensor(parts).sum(0), whole.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_target_token_is_no_loss(loss):
    none = torch.zeros(0, D_MODEL, dtype=torch.float64, requires_grad=True)
    total, count = LOSSES[loss].unlearning(make_sae("topk"), torch.tensor(SALIENT), none, none, 3.0)
    assert (total.item(), count.item(), total.requires_grad) == (0, 0, True)


def test_weights():
    weights = {name: loss.coherence_weight(0.9, 0.5) for name, loss in LOSSES.items()}
    assert weights == {"paper": 0.5, "authors": pytest.approx(0.45), "ours": 0.5}


def test_an_architecture_without_encoder_columns_is_rejected():
    sae = wrap(GatedSAE(GatedSAEConfig(d_in=4, d_sae=4, metadata=META)))
    with pytest.raises(UserError, match="gated"):
        sae.pre_activations(torch.zeros(1, 4))


def test_final_hidden_states_are_what_the_head_reads(tiny):
    inputs = []
    handle = tiny.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    ids = torch.tensor([[1, 17, 250, 33, 9], [1, 400, 7, 8, 5]])
    mask = torch.ones_like(ids)
    tiny.model(input_ids=ids, attention_mask=mask)
    handle.remove()
    torch.testing.assert_close(tiny.final_hidden(ids, mask, positions_of(mask)), inputs[0], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the whole loss of a step

OPTIONS = {"k": 5, "lr": 1e-2, "dropout": 0.0, "layers": [1, 2], "beta": 0.4, "gamma": 0.3, "lam": 7.0}
DATA = {
    "restrict": "evaluation", "fit_on": {"task": "demo_texts"}, "train_size": 64, "val_size": 8, "batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def fitted():
    module = Crisp("demo", "demo", **OPTIONS)
    data = TaskDataModule("demo_forget", **DATA)
    make_trainer().fit(module, datamodule=data)
    return module, data


def hidden_states(module, example, adapted):
    """Hidden states of a text alone, without padding and BOS, in the changed or in the unchanged model."""
    ids = torch.tensor([module.llm.tokenizer(example.prompt)["input_ids"]])
    if adapted:
        with module.own.active():
            states = module.llm.model(input_ids=ids, output_hidden_states=True).hidden_states
    else:
        states = module.llm.model(input_ids=ids, output_hidden_states=True).hidden_states
    return [state[0, 1:].detach().double().numpy() for state in states]


def expected_losses(module, loss, batch):
    """The three terms and their sum by Hugging Face's forward passes of single texts."""
    texts = {kind: [e for e in batch.examples if e.gold == kind] for kind in ("positive", "negative")}
    states = {
        kind: [[hidden_states(module, example, adapted) for example in examples] for adapted in (False, True)]
        for kind, examples in texts.items()
    }

    def side(kind, adapted, index):
        return np.concatenate([state[index] for state in states[kind][adapted]])

    layers = [1, 2]  # resid_post of block L is hidden_states[L + 1]
    terms = []
    for layer in layers:
        reference = getattr(Reference(module.saes[layer]), loss)
        before, after = (side("positive", adapted, layer + 1) for adapted in (False, True))
        total, count = reference(before, after, module.salient[layer], OPTIONS["lam"])
        terms.append(total / count)
    differences = [side("negative", True, n + 1) - side("negative", False, n + 1) for n in layers]
    coherent = [e for e in module.datamodule.examples["train"] if e.gold == "negative"]
    chosen = [coherent[(module.counted + i) % len(coherent)] for i in range(4)]
    pairs = [[hidden_states(module, example, adapted) for adapted in (False, True)] for example in chosen]
    if loss == "ours":
        last = [[last_block(module, example, adapted) for adapted in (False, True)] for example in chosen]
        squares = np.concatenate([(b - a) ** 2 for a, b in last])
    else:
        squares = np.concatenate([(b[-1] - a[-1]) ** 2 for a, b in pairs])
    unlearn, retain, coherence = np.mean(terms), np.mean(np.square(differences)), squares.mean()
    weight = {"paper": 0.3, "authors": 0.4 * 0.3, "ours": 0.3}[loss]
    whole = 0.6 * unlearn + 0.4 * retain + weight * coherence
    return {"loss": whole, "unlearn": unlearn, "retain": retain, "coherence": coherence}


def last_block(module, example, adapted):
    outputs = []
    block = module.llm.model.model.layers[-1]
    handle = block.register_forward_hook(lambda _, __, output: outputs.append(output))
    hidden_states(module, example, adapted)
    handle.remove()
    output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    return output[0, 1:].detach().double().numpy()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_a_step_is_that_of_its_texts_one_by_one(loss, fitted, monkeypatch):
    module, data = fitted
    monkeypatch.setitem(module.hparams, "loss", loss)
    losses = {}
    monkeypatch.setattr(Crisp, "log_loss", lambda self, name, value: losses.__setitem__(name, value.item()))
    examples = data.examples["train"][:10]
    assert {example.gold for example in examples} == {"positive", "negative"}
    # Texts of different lengths, so that the batch is padded.
    rows = [data.token_ids(example, data.fit_task) for example in examples]
    assert len({len(row) for row in rows}) > 1
    ids, mask = module.llm.left_pad([*rows, rows[0]])
    weight = torch.tensor([1.0] * len(rows) + [0.0])  # a filler counts for nothing
    batch = SimpleNamespace(input_ids=ids, attention_mask=mask, weight=weight, examples=[*examples, examples[0]])
    module.training_step(batch, 0)
    batch.examples = examples
    assert losses == pytest.approx(expected_losses(module, loss, batch), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": "theirs"}, "model.loss is 'theirs'.*paper"),
        ({"counts": "ratio"}, "model.counts is 'ratio'"),
        ({"lam": float("nan")}, "model.lam is nan"),
        ({"gamma": float("inf")}, "model.gamma is inf"),
        ({"lr": float("nan")}, "model.lr is nan"),
        ({"weight_decay": float("nan")}, "model.weight_decay is nan"),
    ],
)
def test_values_without_meaning_are_rejected(options, match):
    with pytest.raises(UserError, match=match):
        Crisp("demo", "demo", **options)


# ---------------------------------------------------------------- salience by plain counts


def loop_over_texts(module, layer):
    """Firing counts and summed activations of the first texts of each kind, equally many, and the number of tokens."""
    fired, total, n = np.zeros((2, 512)), np.zeros((2, 512)), [0, 0]
    reference, sides = Reference(module.saes[layer]), {0: [], 1: []}
    for example in module.datamodule.examples["train"]:
        sides[int(example.gold == "positive")].append(example)
    size = min(map(len, sides.values()))
    for kind, examples in sides.items():
        for example in examples[:size]:
            for x in hidden_states(module, example, adapted=False)[layer + 1]:
                activations = reference.act(reference.pre(x))
                fired[kind] += activations > 0
                total[kind] += activations
                n[kind] += 1
    return fired, total, n


def test_plain_counts_compare_equally_many_texts():
    rates, module = (
        Crisp("demo", "demo", k=60, least_ratio=2.0, layers=[1], counts=counts) for counts in ("rates", "counts")
    )
    make_trainer(max_steps=1).fit(rates, datamodule=TaskDataModule("demo_forget", **DATA))
    with pytest.warns(UserWarning, match="model.counts is counts.* 16 target and 48 retain"):
        make_trainer(max_steps=1).fit(module, datamodule=TaskDataModule("demo_forget", **DATA))
    fired, total, n = loop_over_texts(module, 1)
    salience = module.salience[1]
    assert salience.tokens.tolist() == n
    # Features next to the k-th activation can change places by rounding.
    np.testing.assert_allclose(salience.fired.numpy(), fired, atol=2)
    ratio, difference = total[1] / (total[0] + 1e-9), fired[1] - fired[0]
    expected = [i for i in np.argsort(-difference, kind="stable") if difference[i] > 0 and ratio[i] >= 2]
    assert set(module.salient[1]) == set(expected[:60])
    # All texts would leave hardly any feature that fires more often in the fewer target texts.
    assert len(module.salient[1]) > 0.7 * len(rates.salient[1])


def test_equally_many_texts_are_all_counted():
    # 480 texts of either subject. A warning would be an error here.
    data = {**DATA, "train_size": 960, "fit_on": {"task": "demo_texts", "filter": {"subject": ["drink", "pet"]}}}
    modules = [Crisp("demo", "demo", k=5, layers=[1], counts=counts) for counts in ("rates", "counts")]
    for module in modules:
        make_trainer(max_steps=1).fit(module, datamodule=TaskDataModule("demo_forget", **data))
    rates, counts = (module.salience[1] for module in modules)
    assert rates.tokens.tolist() == counts.tokens.tolist()
    assert torch.equal(rates.fired, counts.fired)
