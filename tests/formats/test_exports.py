"""What is written for other programs does there what steering does here, on many architectures."""

import json
import os
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_folder
from corrsteer_pl.formats.biases import with_biases
from corrsteer_pl.formats.easysteer import phases
from corrsteer_pl.formats.parity import Answers, Parity
from corrsteer_pl.formats.reading import read_vectors
from corrsteer_pl.formats.registry import FORMATS
from corrsteer_pl.interventions.steering import Schedule
from corrsteer_pl.models.sites import Site, decoder_blocks
from tests.architectures import CONFIGS, GROUPED, PROMPTS, make_tiny, vectors

# Formats that cannot say what is added to a block's output, by architecture.
REFUSED = {
    "peft": {"gemma2": "a norm follows", "gemma3": "a norm follows", "gpt2": "is a Conv1D"},
    "merged": {
        "gemma2": "a norm follows", "gemma3": "a norm follows", "mistral": "its sliding window",
        "qwen3": "no ordinary form", "qwen3_5": "no ordinary form",
    },
}  # fmt: skip


def by_hand(llm, added):
    """The model with vectors added to outputs of blocks by hooks of torch alone."""
    stack = ExitStack()
    for site, vector in added.items():
        block = decoder_blocks(llm.model)[site.layer]

        def add(_module, _args, output, vector=vector):
            return output + vector if torch.is_tensor(output) else (output[0] + vector, *output[1:])

        stack.callback(block.register_forward_hook(add).remove)
    return stack


def exported(llm, added, to, path):
    """Answers of the model as it is with what was written."""
    if "." not in path.name:
        path.mkdir()
    FORMATS[to].write(llm, added, path, Schedule("all"))
    with FORMATS[to].opened(llm, path) as model:
        return Answers.of(model, PROMPTS, nullcontext())


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_does_what_adding_by_hand_does(name, to, llm, tmp_path):
    tiny = make_tiny(name, llm.tokenizer)
    added = vectors((1, 2))
    place = tmp_path / FORMATS[to].artefact.format(run="run")
    if sentence := REFUSED.get(to, {}).get(name):
        with pytest.raises(UserError, match=sentence):
            exported(tiny, added, to, place)
        return
    unchanged = Answers.of(tiny.model, PROMPTS, nullcontext())
    by_hands = Answers.of(tiny.model, PROMPTS, by_hand(tiny, added))
    parity = Parity.between(unchanged, by_hands, exported(tiny, added, to, place), "")
    assert parity.effect > 0.1
    assert parity.difference < 1e-4 * max(1, parity.effect)
    assert parity.same_text == len(PROMPTS)
    parity.require(torch.float32)
    # Nothing of it stays in the loaded model.
    again = Answers.of(tiny.model, PROMPTS, nullcontext())
    assert again.distance(unchanged) == 0


@pytest.mark.parametrize("kind", ["attn_out", "mlp_out", "resid_pre"])
@pytest.mark.parametrize("to", ["peft", "merged", "lm_eval"])
def test_other_sites_are_biases_or_outputs_too(kind, to, llm, tmp_path):
    tiny = make_tiny("llama", llm.tokenizer)
    added = vectors((1, 2), kind)
    changed = Answers.of(tiny.model, PROMPTS, steered(tiny, added))
    assert exported(tiny, added, to, tmp_path / FORMATS[to].artefact.format(run="run")).distance(changed) < 1e-3


def steered(llm, added):
    from corrsteer_pl.interventions.steering import SteeringVectors

    return SteeringVectors(added, Schedule("all")).attached(llm.model)


def test_mistral_without_a_window_is_written_as_llama(llm, tmp_path):
    tiny = make_tiny("mistral", llm.tokenizer, MistralConfig(**GROUPED, sliding_window=None))
    FORMATS["merged"].write(tiny, vectors((1,)), tmp_path, Schedule("all"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(tmp_path)("A hen")["input_ids"] == llm.tokenizer("A hen")["input_ids"]


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_a_norm_at_the_end_of_opts_blocks_is_told(to, llm, tmp_path):
    config = CONFIGS["opt"]()
    config.do_layer_norm_before = False
    tiny = make_tiny("opt", llm.tokenizer, config)
    with pytest.raises(UserError, match=r"bias of model.decoder.layers.1.fc2, but .* \(final_layer_norm\)"):
        exported(tiny, vectors((1,)), to, tmp_path / to)
    added = vectors((1,), "attn_out")
    changed = Answers.of(tiny.model, PROMPTS, steered(tiny, added))
    assert exported(tiny, added, to, tmp_path / f"attention_{to}").distance(changed) < 1e-3


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
@pytest.mark.parametrize("to", ["merged", "peft"])
def test_weights_can_be_read_by_whom_other_files_can_be_read(to, umask, mode, llm, tmp_path):
    before = os.umask(umask)
    try:
        write_folder(tmp_path / to, lambda new: FORMATS[to].write(llm, vectors((1,), width=128), new, Schedule("all")))
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / to).iterdir()}
    assert {"merged": "model.safetensors", "peft": "adapter_model.safetensors"}[to] in modes
    assert set(modes.values()) == {mode}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_is_told_as_such(llm):
    with pytest.raises(OSError, match="No space left on device"):
        FORMATS["lm_eval"].write(llm, vectors((1,)), Path("/dev/full"), Schedule("all"))


def test_biases_share_the_weights_and_leave_them_alone(llm):
    tiny = make_tiny("gpt_neox", llm.tokenizer)
    before = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    changed = with_biases(tiny.model, vectors((1,)))
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"
    differing = [key for key, weight in changed.state_dict().items() if not torch.equal(weight, before[key])]
    assert differing == [name]
    places = [model.state_dict()["gpt_neox.embed_in.weight"].data_ptr() for model in (changed, tiny.model)]
    assert places[0] == places[1]
    assert all(torch.equal(weight, before[key]) for key, weight in tiny.model.state_dict().items())


@pytest.mark.parametrize(
    ("to", "site", "sentence"),
    [
        ("gguf", Site(0, "resid_post"), "output of block 0, which llama.cpp's control vectors cannot say"),
        ("gguf", Site(1, "resid_pre"), "output of block 0"),
        ("gguf", Site(0, "resid_pre"), "the embeddings, which gguf cannot say"),
        ("gguf", Site(1, "mlp_out"), "steers at blocks.1.hook_mlp_out, but gguf can only say outputs of blocks"),
        ("easysteer", Site(1, "attn_out"), "easysteer can only say outputs of blocks"),
        ("lm_eval", Site(0, "resid_pre"), "the embeddings, which lm_eval cannot say"),
    ],
)
def test_what_a_format_cannot_say_is_one_sentence(to, site, sentence, llm, tmp_path):
    tiny = make_tiny("llama", llm.tokenizer)
    with pytest.raises(UserError, match=sentence):
        FORMATS[to].write(tiny, {site: torch.ones(32)}, tmp_path / "file", Schedule("all"))
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("layers", "kind", "gguf"),
    [((1, 2), "resid_post", True), ((2,), "resid_pre", True), ((0, 1), "resid_post", False), ((1,), "resid_pre", False),
     ((1,), "attn_out", False), ((1,), "mlp_out", False)],
)  # fmt: skip
@pytest.mark.parametrize(
    ("name", "to", "other"),
    [("qwen3_5", "merged", "peft"), ("mistral", "merged", "peft"), ("gemma2", "peft", "lm_eval")],
)
def test_gguf_is_advised_only_where_it_can_say_the_sites(name, to, other, layers, kind, gguf, llm, tmp_path):
    tiny = make_tiny(name, llm.tokenizer)
    with pytest.raises(UserError, match=rf"Choose --to {other}{' or --to gguf' if gguf else ''}\.$"):
        FORMATS[to].write(tiny, vectors(layers, kind), tmp_path, Schedule("all"))


@pytest.mark.parametrize("to", ["gguf", "easysteer"])
def test_biases_are_advised_for_what_attention_writes(to, llm, tmp_path):
    tiny = make_tiny("llama", llm.tokenizer)
    with pytest.raises(UserError, match="Choose --to lm_eval, .* or --to peft or merged, which can where no norm"):
        FORMATS[to].write(tiny, vectors((1,), "attn_out"), tmp_path / "file", Schedule("all"))


def test_a_control_vector_is_what_llama_cpp_reads(llm, tmp_path):
    from gguf import GGUFReader

    tiny = make_tiny("qwen2", llm.tokenizer)
    added = vectors((1, 2))
    FORMATS["gguf"].write(tiny, added, tmp_path / "file.gguf", Schedule("all"))
    reader = GGUFReader(tmp_path / "file.gguf")
    fields = {name: reader.get_field(name) for name in ("general.architecture", "controlvector.model_hint")}
    assert [field.contents() for field in fields.values()] == ["controlvector", "qwen2"]
    count = reader.get_field("controlvector.layer_count")
    assert (count.types[0].name, count.contents()) == ("UINT32", 2)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == ["direction.1", "direction.2"]
    for site, vector in added.items():
        tensor = tensors[f"direction.{site.layer}"]
        assert (tensor.tensor_type.name, list(tensor.shape)) == ("F32", [32])
        torch.testing.assert_close(torch.tensor(tensor.data), vector)


def test_phases_say_the_positions_or_refuse(llm, tmp_path):
    assert phases(Schedule("all")) == {"prefill_trigger_tokens": [-1], "generate_trigger_tokens": [-1]}
    assert phases(Schedule("prompt_last")) == {"prefill_trigger_positions": [-1]}
    for schedule in (Schedule("first_k", 3), Schedule("generated", decay=0.9)):
        with pytest.raises(UserError, match="easysteer steers the prompt, its last position, or all generated tokens"):
            phases(schedule)
    FORMATS["easysteer"].write(make_tiny("llama", llm.tokenizer), vectors((0, 2)), tmp_path, Schedule("generated"))
    (config,) = json.loads((tmp_path / "request.json").read_text(encoding="utf-8"))["steer_vector_request"][
        "vector_configs"
    ]
    assert (config["target_layers"], config["scale"], config["prefill_trigger_positions"]) == ([0, 2], 1.0, [-1])
    assert read_vectors(tmp_path / config["path"]).vectors.keys() == {Site(0, "resid_post"), Site(2, "resid_post")}


def test_a_difference_beyond_rounding_is_refused():
    assert "1.0e-06" in str(Parity(4, 1e-6, 2.0, 4, "a reader"))
    Parity(4, 1e-6, 2.0, 4, "").require(torch.float32)
    with pytest.raises(UserError, match="logits differ by up to 0.14, where steering itself changes them by 2"):
        Parity(4, 0.14, 2.0, 3, "").require(torch.float32)
