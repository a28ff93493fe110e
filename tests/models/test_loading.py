"""Language models whose files are incomplete or broken, and the fingerprint of those that are whole."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from corrsteer_pl import demo
from corrsteer_pl.errors import UserError
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.fingerprint import fingerprint
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae import saes_identity
from corrsteer_pl.models.sae_loading import load_saes
from tests.architectures import NEW, batch_of, vectors

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(demo.MODEL, tmp_path / "model")


def configure(folder, **settings):
    config = folder / "config.json"
    before = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**before, **settings}), encoding="utf-8")


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_missing_weight_is_named(folder, missing):
    weights = load_file(folder / WEIGHTS)
    del weights[missing]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(
        UserError, match=rf"lacks 1 of its weights \({missing}\). Its configuration and its weights do not"
    ):
        LanguageModel.load(str(folder))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"num_hidden_layers": 6},
            r"lacks 18 of its weights \(model.layers.4.input_layernorm.weight, model.layers.4.mlp.d",
        ),
        ({"num_hidden_layers": 3}, r"has weights that its configuration does not ask for, 9 in all \(model.layers.3.i"),
        (
            {"intermediate_size": 64},
            r"has 12 of its weights in other shapes than its configuration asks for \(model.la",
        ),
        ({"num_hidden_layers": "x"}, "could not be loaded as a causal language model .Validation error for field"),
        ({"num_attention_heads": 7}, "could not be loaded as a causal language model"),
    ],
)
def test_weights_that_do_not_belong_to_the_configuration_are_named(folder, settings, sentence):
    configure(folder, **settings)
    with pytest.raises(UserError, match=sentence):
        LanguageModel.load(str(folder))


def test_weights_that_transformers_ties_or_ignores_are_not_missed(folder):
    # An old checkpoint's buffer, and the head that is the embedding.
    weights = load_file(folder / WEIGHTS)
    assert "lm_head.weight" not in weights
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    assert LanguageModel.load(str(folder)).identity["fingerprint"] == LanguageModel.load("demo").identity["fingerprint"]


def test_weights_as_plain_pickles_are_loaded(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert fingerprint(LanguageModel.load(str(folder)).model) == fingerprint(LanguageModel.load("demo").model)


class Other:
    def __reduce__(self):
        return print, ("unpickled",)


def write(name, content):
    def broken(folder):
        (folder / WEIGHTS).unlink()
        if name:
            (folder / name).write_bytes(content() if callable(content) else content)

    return broken


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (write("pytorch_model.bin", b""), "its weights cannot be read: EOFError"),
        (write("pytorch_model.bin", pickle.dumps(Other(), 2)), "its weights cannot be read: UnpicklingError"),
        (write("pytorch_model.bin", b"junkjunk"), "its weights cannot be read: KeyError"),
        (write(WEIGHTS, lambda: (demo.MODEL / WEIGHTS).read_bytes()[:9000]), "incomplete metadata, file not fully"),
        (write(WEIGHTS, b""), "header too small"),
        (write(None, b""), "no file named model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"), "is not a valid JSON file"),
        (lambda folder: (folder / "config.json").write_text("[]", encoding="utf-8"), "Unrecognized model"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{", encoding="utf-8"),
            "its tokenizer cannot be read: JSOND",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}", encoding="utf-8"),
            "its tokenizer cannot be read: Key",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "Couldn't instantiate the backend tokenizer"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("[", encoding="utf-8"),
            "its tokenizer cannot be read: JSOND",
        ),
    ],
)
def test_broken_files_are_one_sentence(folder, broken, sentence, capsys):
    broken(folder)
    with pytest.raises(UserError, match=f"the folder .* could not be loaded as a causal .*{sentence}") as raised:
        LanguageModel.load(str(folder))
    assert "\n" not in str(raised.value)
    assert "unpickled" not in capsys.readouterr().out


# ---------------------------------------------------------------- fingerprint


def test_a_fingerprint_covers_every_value(llm):
    model = LanguageModel.load("demo").model
    before = fingerprint(model)
    assert before == fingerprint(llm.model)
    for name, parameter in model.named_parameters():
        last = parameter.view(-1)[-1].clone()
        parameter.view(-1)[-1] = -3 * last - 1
        assert fingerprint(model) != before, name
        parameter.view(-1)[-1] = last
    assert fingerprint(model) == before


def test_a_fingerprint_is_the_same_whatever_the_chunks(llm, monkeypatch):
    expected = fingerprint(llm.model)
    monkeypatch.setattr("corrsteer_pl.models.fingerprint.CHUNK", 1000)
    monkeypatch.setattr("corrsteer_pl.models.fingerprint.THREADS", 1)
    assert fingerprint(llm.model) == expected


def test_a_fingerprint_is_the_same_in_another_precision(folder):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    found = {LanguageModel.load(str(folder), dtype).identity["fingerprint"] for dtype in ("float32", "bfloat16")}
    assert len(found) == 1


def test_integers_and_what_layers_keep_beside_tensors_count():
    class Quantised(torch.nn.Module):
        def __init__(self, state):
            super().__init__()
            self.register_buffer("weight", torch.arange(6, dtype=torch.uint8).view(2, 3))
            self.register_buffer("scale", torch.tensor(0.5))
            self.state = state

        def get_extra_state(self):
            return self.state

    first, other = Quantised("nf4"), Quantised("fp4")
    assert fingerprint(first) == fingerprint(Quantised("nf4")) != fingerprint(other)
    before = fingerprint(first)
    first.weight[1, 2] += 1
    assert fingerprint(first) != before


def test_the_fingerprints_of_saes_cover_every_value(llm):
    saes = load_saes("demo", llm)
    before = saes_identity("demo", saes)["fingerprints"]
    assert before == saes_identity("demo", load_saes("demo", llm, dtype="float32"))["fingerprints"]
    saes[1].sae.W_dec[-1] *= -3
    after = saes_identity("demo", saes)["fingerprints"]
    assert [layer for layer in before if before[layer] != after[layer]] == ["1"]


DISK = {"model.layers": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {**DISK, "lm_head": "cpu"}, {"": "disk"}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offloaded_model_is_recognised_and_says_the_same(tmp_path, device_map, dtype):
    pytest.importorskip("accelerate")
    here = LanguageModel.load("demo", dtype)
    away = LanguageModel.load("demo", dtype, device_map=device_map, offload_folder=str(tmp_path))
    offloaded = [name for name, parameter in away.model.named_parameters() if parameter.device.type == "meta"]
    assert bool(offloaded) is ("disk" in device_map.values())
    assert away.identity["fingerprint"] == here.identity["fingerprint"]
    batch, variants = batch_of(here), SteeringVectors.stack([{}, vectors(width=128)], Schedule())
    assert Decoder(away, NEW).compare(batch, variants) == Decoder(here, NEW).compare(batch, variants)
    assert list(load_saes("demo", away)) == list(load_saes("demo", here))


def test_a_weight_without_values_is_named(llm):
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="the weight .* has no values: it was offloaded to where it cannot be read"):
        fingerprint(module)


# ---------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for m in messages %}{{ m['content'] }}", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ raise_exception('no assistant here') }}", "TemplateError: no assistant here"),
        ("{{ nothing.of.that }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ messages[9]['content'] }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages + 'x' }}", "TypeError"),
    ],
)
def test_a_chat_template_that_fails_is_named_with_its_own_error(template, sentence):
    llm = LanguageModel.load("demo")
    llm.tokenizer.chat_template = template
    with pytest.raises(
        UserError, match=f"the chat template of the tokenizer of demo fails on 3 turns .*{sentence}"
    ) as e:
        llm.prompt_ids(["one", "two", "three"], chat=True)
    assert str(e.value).endswith("Correct it, or set data.chat_template to false.")
    assert llm.prompt_ids(["one", "two", "three"], chat=False)


MARKER = "\u2581"
# As in Llama 2, and as newer conversions of SentencePiece write it.
MARKING = {
    "normalizer": (normalizers.Sequence([normalizers.Prepend(MARKER), normalizers.Replace(" ", MARKER)]), None),
    "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
}


@pytest.fixture(params=MARKING)
def marking(request, llm):
    """A tokenizer that puts a space marker before every text."""
    words = ["<unk>", "\u2581", "\n", ":", "\u2581Answer", "A", "B", "\u2581A", "\u2581B", *"answerC"]
    built = Tokenizer(models.Unigram([(word, -1.0 - (len(word) == 1)) for word in dict.fromkeys(words)], 0, False))
    normalizer, pre_tokenizer = MARKING[request.param]
    if normalizer:
        built.normalizer = normalizer
    if pre_tokenizer:
        built.pre_tokenizer = pre_tokenizer
    built.decoder = decoders.Metaspace(prepend_scheme="always")
    return LanguageModel("marking", llm.model, PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>"))


def test_an_options_token_is_the_one_that_follows_a_prompt(marking):
    def ids(text):
        return marking.tokenizer(text, add_special_tokens=False)["input_ids"]

    tokens = marking.tokenizer.convert_ids_to_tokens
    assert tokens(marking.single_tokens([" A", " B"])) == ["\u2581A", "\u2581B"]
    assert tokens(marking.single_tokens(["A", "B"])) == ["A", "B"]
    # By itself it is another token, for the marker stands before it.
    assert tokens(ids("A")) == ["\u2581A"]
    for option, prompt in ((" A", "Answer:"), ("A", "Answer:\n")):
        assert ids(prompt + option) == ids(prompt) + marking.single_tokens([option])


def test_whether_an_option_is_one_token_can_be_asked(marking, llm):
    assert len(marking.following_ids(" ABA")) > 1
    with pytest.raises(UserError, match="the option ' ABA' is . tokens for the tokenizer of marking"):
        marking.single_tokens([" A", " ABA"])
    assert llm.single_tokens([" A"]) == llm.tokenizer(" A", add_special_tokens=False)["input_ids"]
