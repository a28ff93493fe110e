import pytest
import torch

from corrsteer_pl.models.pooling import Pool

ACTIVATIONS = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]], [[4.0, 4.0], [5.0, 5.0], [6.0, 6.0]]])
COUNTED = torch.tensor([[True, True, False], [False, False, False]])


@pytest.mark.parametrize(("kind", "expected"), [("max", [3.0, 2.0]), ("mean", [2.0, 1.0]), ("all", [3.0, 2.0])])
def test_only_counted_tokens_are_pooled_and_none_gives_zero(kind, expected):
    pool = Pool(kind)
    for step in range(3):
        pool.update(ACTIVATIONS[:, step], COUNTED[:, step])
    assert pool.value.tolist() == [expected, [0.0, 0.0]]


def test_an_empty_pool_has_no_value():
    with pytest.raises(RuntimeError, match="no token"):
        _ = Pool("max").value


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_half_precision_loses_no_token_and_infinity_no_sample(kind):
    values = torch.arange(1000) % 7 + 1.0
    halves, whole = Pool(kind), Pool(kind)
    for value in values:
        halves.update(value.expand(1, 2).bfloat16(), torch.tensor([True]))
        whole.update(value.expand(1, 2), torch.tensor([True]))
    assert torch.equal(halves.value, whole.value)
    halves.update(torch.full((1, 2), torch.inf, dtype=torch.bfloat16), torch.tensor([False]))
    assert torch.equal(halves.value, whole.value)


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_some_samples_go_on_without_the_others(kind):
    pool = Pool(kind)
    pool.update(torch.tensor([[1.0], [2.0], [3.0]]), torch.ones(3, dtype=torch.bool))
    pool.update(torch.tensor([[5.0], [7.0]]), torch.tensor([True, True]), torch.tensor([0, 2]))
    assert pool.value.tolist() == ([[5.0], [2.0], [7.0]] if kind == "max" else [[3.0], [2.0], [5.0]])
