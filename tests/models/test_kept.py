"""Prompts that are read once and answered several times."""

import pytest

from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.decoding.kept import KeptPrompts
from corrsteer_pl.models.llm import LanguageModel
from tests.architectures import NEW, batch_of, vectors

MANY = [{}] + [vectors((layer,), seed=layer) for layer in (0, 1, 2)]


def stacked(*places):
    return SteeringVectors.stack([MANY[place] for place in places], Schedule())


@pytest.mark.parametrize("branches", [None, False])
def test_kept_prompts_give_the_same_answers(tiny, branches):
    batch, kept, decoder = batch_of(tiny), KeptPrompts(2**30), Decoder(tiny, NEW)
    whole = Decoder(tiny, NEW).compare(batch, stacked(0, 1, 2, 3), branches)
    assert decoder.compare(batch, stacked(0, 1), branches, kept) == whole[:2]
    assert kept.find(batch).read is not None
    assert decoder.compare(batch, stacked(2), branches, kept) == whole[2:3]
    assert decoder.compare(batch, stacked(3, 2, 1), branches, kept) == whole[:0:-1]
    assert kept.find(batch_of(tiny)) is None, "equal prompts in another batch are other prompts"


def test_what_has_no_room_is_read_again(tiny):
    batch, kept, decoder = batch_of(tiny), KeptPrompts(100), Decoder(tiny, NEW)
    first = decoder.compare(batch, stacked(0, 1), kept=kept)
    assert kept.find(batch).read is None
    assert decoder.compare(batch, stacked(0, 1), kept=kept) == first


def test_low_precision_keeps_the_shape_of_its_forward_passes():
    llm = LanguageModel.load("demo", "bfloat16")
    batch, kept, shapes = batch_of(llm), KeptPrompts(2**30), []
    width = llm.config.hidden_size
    many = [{}] + [vectors((layer,), seed=layer, width=width) for layer in (0, 1, 2)]
    decoder = Decoder(llm, NEW)
    whole = decoder.compare(batch, SteeringVectors.stack(many, Schedule()))  # and what is tried once with every model
    forward = llm.forward

    def watched(tokens, *args, **kwargs):
        shapes.append(tuple(tokens.shape))
        return forward(tokens, *args, **kwargs)

    llm.forward = watched
    decoder.compare(batch, SteeringVectors.stack(many, Schedule()), kept=kept)
    (first,) = {shape for shape in shapes if shape[1] == 1}
    shapes.clear()
    again = decoder.compare(batch, SteeringVectors.stack(many[2:3], Schedule()), kept=kept)
    assert set(shapes) == {first}
    assert first == (4 * len(batch.input_ids), 1)
    assert again == whole[2:3]
