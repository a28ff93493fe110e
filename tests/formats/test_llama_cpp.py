"""llama.cpp itself reads what is written for it, and adds it to what our steering adds it to."""

import sys

import pytest
import torch

from corrsteer_pl.formats.control_vector import write_control_vector, write_gguf
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from tests.architectures import PROMPTS, make_tiny, vectors

if not sys.platform.startswith("linux"):
    pytest.skip("its library is called as on Linux", allow_module_level=True)
pytest.importorskip("xllamacpp", reason="llama.cpp comes with the extra 'dev'")

from tests.formats.llama_cpp import ARCHITECTURES, LlamaCpp, loaded, write_model


def logits(tiny, prompt, added=None, positions="all"):
    steering = SteeringVectors(added or {}, Schedule(positions))
    with torch.no_grad(), steering.attached(tiny.model):
        return tiny.model(torch.tensor([prompt])).logits[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_steers_as_the_run_does(name, llm, tmp_path):
    tiny, added = make_tiny(name, llm.tokenizer), vectors((1, 2))
    write_model(tiny.model, tmp_path / "model.gguf")
    write_control_vector(tiny, added, tmp_path / "vectors.gguf")
    llama = LlamaCpp(tmp_path / "model.gguf")
    for prompt in PROMPTS:
        unchanged = logits(tiny, prompt)
        torch.testing.assert_close(llama.logits(prompt), unchanged, atol=1e-5, rtol=0)
        ours = logits(tiny, prompt, added)
        torch.testing.assert_close(llama.logits(prompt, tmp_path / "vectors.gguf"), ours, atol=1e-5, rtol=0)
        assert (ours - unchanged).abs().max() > 1
        # Added from the last token of the prompt on, it is what positions "generated" does.
        ours = logits(tiny, prompt, added, "generated")
        theirs = llama.logits(prompt, tmp_path / "vectors.gguf", from_token=len(prompt) - 1)
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_llama_cpp_refuses_block_0_as_we_say(tmp_path):
    write_gguf({1: torch.ones(32)}, "llama", tmp_path / "one.gguf")
    assert loaded(tmp_path / "one.gguf").width == 32
    write_gguf({0: torch.ones(32), 1: torch.ones(32)}, "llama", tmp_path / "zero.gguf")
    assert loaded(tmp_path / "zero.gguf").width == -1
