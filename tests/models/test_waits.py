"""No step asks for a value that an accelerator would have to be waited for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.sae_loading import load_saes
from corrsteer_pl.stats.moments import Moments
from tests.architectures import batch_of, vectors
from tests.conftest import random_saes

# Operations whose result is a number, or a tensor of a size that depends on values.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal"}
# Padded, and with four more tokens within every sliding window.
PROMPTS = [[1, 400], [1, 99, 98]]


class Waits(TorchDispatchMode):
    """Counts what would be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.count += name in WAITS or by_mask
        return func(*args, **(kwargs or {}))


def waits(llm, steps, decode):
    decoder = Decoder(llm, steps)
    decoder.look_every = 8
    decoder.end = torch.tensor([], dtype=torch.long)
    decode(decoder)  # what is tried once with every model
    with Waits() as seen:
        decode(decoder)
    return seen.count


def test_a_value_is_counted():
    with Waits() as seen:
        ones = torch.ones(3)
        assert ones.any()
        ones[ones > 0] = 2
    assert seen.count == 2


@pytest.mark.parametrize("way", ["generate", "rows", "branches"])
def test_more_steps_are_not_waited_for(tiny, way):
    if tiny.name == "qwen3_5":
        pytest.skip("transformers looks at the masks of models with linear attention")
    batch = batch_of(tiny, PROMPTS)
    variants = SteeringVectors.stack([{}, vectors()], Schedule(decay=0.9))

    def decode(decoder):
        return decoder.generate(batch) if way == "generate" else decoder.compare(batch, variants, way == "branches")

    assert waits(tiny, 2, decode) == waits(tiny, 4, decode)


def test_nor_what_is_read(llm, tmp_path):
    saes = load_saes(str(random_saes(tmp_path, [0, 2])), llm)
    batch = batch_of(llm, PROMPTS)
    for kinds in (["max", "mean"], ["max", "mean", "all"]):
        read = [waits(llm, n, lambda decoder, k=kinds: decoder.generate(batch, PoolReader(saes, k))) for n in (2, 4)]
        # What reads the prompt has a forward pass of its own for it, with one look at the mask.
        assert read[0] == read[1] == waits(llm, 2, lambda decoder: decoder.generate(batch)) + ("all" in kinds)
    with Waits() as seen:
        Moments(7).update(torch.rand(4, 7), torch.rand(4))
    assert seen.count == 0
