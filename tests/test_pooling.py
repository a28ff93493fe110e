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
