"""Language models in GGUF files, written here from tiny Hugging Face models."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tokenizers import processors
from transformers import LlamaConfig
from transformers.utils import logging

from corrsteer_pl.errors import UserError
from corrsteer_pl.models import gguf as subject
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.llm import LanguageModel, local_name
from tests.architectures import NEW, SIZES, batch_of, hf_texts, make_tiny
from tests.hub.language_models import CHAT_TEMPLATE, tokenizer

gguf = pytest.importorskip("gguf")

REAL = Path(__file__).parents[2] / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
HEADS, KEY_VALUE_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
# GGUF files have no generation configuration that could name the end of a turn.
pytestmark = pytest.mark.filterwarnings("ignore:the EOS tokens of .* lack the token after an answer")
TEXTS = ("How do I bake bread at home?", " water,\n\n  3.5 litres", "<start_of_turn>user\nWho?<end_of_turn>", "")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny Llama with a chat template, saved as safetensors; the tokenizer puts no BOS before a text."""
    tokens = tokenizer(chat=True)
    tokens.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    sizes = {**SIZES, "vocab_size": len(tokens), "num_key_value_heads": KEY_VALUE_HEADS}
    ids = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    made = make_tiny("llama", tokens, LlamaConfig(**{**sizes, **ids}, tie_word_embeddings=False))
    folder = tmp_path_factory.mktemp("original")
    made.model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return LanguageModel.load(str(folder))


@pytest.fixture(scope="module")
def file(original, tmp_path_factory):
    return write_gguf(original, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def write_gguf(llm, path, architecture="llama", with_tokenizer=True, without=(), extra=None, blocks=False, bos=None):
    """Write a Llama in float32 as llama.cpp's converter does."""
    config, writer = llm.config, gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if with_tokenizer:
        add_tokenizer(writer, llm.tokenizer, llm.tokenizer.bos_token_id if bos is None else bos)
    for name, weight in {**llm.model.state_dict(), **(extra or {})}.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if name in without:
            continue
        heads = {"attn_q": HEADS, "attn_k": KEY_VALUE_HEADS}.get(name.split(".")[-2])
        array = (permuted(weight, heads) if heads else weight).contiguous().numpy()
        if blocks and array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(weight, heads):
    """Rotary pairs lie side by side in llama.cpp, and half a head apart in transformers."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def add_tokenizer(writer, tokens, bos):
    model = json.loads(tokens.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(tokens.get_vocab(), key=tokens.get_vocab().get)
    special = {token.content for token in tokens.added_tokens_decoder.values() if token.special}
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(tokens.eos_token_id)
    writer.add_pad_token_id(tokens.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokens.chat_template)


def logits(llm):
    batch = batch_of(llm)
    return llm.model(batch.input_ids, attention_mask=batch.attention_mask).logits


# ---------------------------------------------------------------- what is loaded


def test_a_gguf_file_is_the_model_that_it_was_written_from(original, file):
    loaded = LanguageModel.load(str(file))
    torch.testing.assert_close(logits(loaded), logits(original))
    assert loaded.identity == {"name": str(file), "fingerprint": original.identity["fingerprint"]}
    assert hf_texts(loaded, batch_of(loaded)) == hf_texts(original, batch_of(original))
    batch = batch_of(loaded)
    assert Decoder(loaded, NEW).generate(batch) == Decoder(original, NEW).generate(batch)
    assert (loaded.eos_token_ids, loaded.placed) == (original.eos_token_ids, False)


def test_the_tokenizer_and_its_chat_template_come_along(original, file):
    loaded = LanguageModel.load(str(file))
    for text in TEXTS:
        assert loaded.token_ids(text) == original.token_ids(text)
    assert loaded.tokenizer.chat_template == CHAT_TEMPLATE
    turns = ["Who lives there?", "Nobody.", "Why?"]
    assert loaded.prompt_ids(turns, chat=True) == original.prompt_ids(turns, chat=True)
    for token in ("bos", "eos", "pad"):
        assert getattr(loaded.tokenizer, f"{token}_token_id") == getattr(original.tokenizer, f"{token}_token_id")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_precision_is_the_one_asked_for(original, file, dtype):
    loaded = LanguageModel.load(str(file), dtype)
    assert str(loaded.model.dtype) == f"torch.{dtype}"
    if dtype == "bfloat16":
        assert loaded.identity["fingerprint"] == original.identity["fingerprint"]


def test_what_was_loaded_can_be_saved(file, tmp_path):
    loaded = LanguageModel.load(str(file))
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = LanguageModel.load(str(tmp_path))
    assert torch.equal(logits(again), logits(loaded))
    assert again.identity["fingerprint"] == loaded.identity["fingerprint"]
    assert again.token_ids(TEXTS[0]) == loaded.token_ids(TEXTS[0])


def test_only_the_file_itself_counts(original, file, tmp_path, monkeypatch):
    # Another tokenizer beside it, and another file of its name in the working directory.
    shutil.copy(file, tmp_path / "tiny.gguf")
    tokenizer(says=["said"]).save_pretrained(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("tiny.gguf").write_bytes(b"GGUF")
    loaded = LanguageModel.load("../tiny.gguf")
    assert loaded.identity["fingerprint"] == original.identity["fingerprint"]
    assert loaded.has_chat_template
    assert local_name("../tiny.gguf") == str(tmp_path / "here/../tiny.gguf")


def test_blocks_of_weights_are_unpacked(original, tmp_path):
    loaded = LanguageModel.load(str(write_gguf(original, tmp_path / "q8.gguf", blocks=True)))
    assert loaded.identity["fingerprint"] != original.identity["fingerprint"]
    for (name, found), expected in zip(
        loaded.model.named_parameters(), original.model.state_dict().values(), strict=True
    ):
        assert found.dtype == torch.float32, name
        # Eight bits a number: half a step of the largest in its block, rounded in float16.
        torch.testing.assert_close(found, expected, rtol=0, atol=expected.abs().max().item() / 250)
    loaded.model.save_pretrained(tmp_path)


@pytest.mark.parametrize("silent", [True, False])
def test_progress_is_shown_if_transformers_shows_any(file, silent, capsys):
    before = logging.is_progress_bar_enabled()
    try:
        (logging.disable_progress_bar if silent else logging.enable_progress_bar)()
        LanguageModel.load(str(file))
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
    assert ("GGUF" in capsys.readouterr().err) is not silent


def test_a_device_map_is_followed(original, file):
    loaded = LanguageModel.load(str(file), device_map={"": "cpu"})
    assert loaded.placed
    assert loaded.identity["fingerprint"] == original.identity["fingerprint"]


# ---------------------------------------------------------------- from the Hub


@pytest.fixture
def on_hub(hub, file):
    folder = hub.model("own/tiny-GGUF")
    (folder / "deep").mkdir(exist_ok=True)
    shutil.copy(file, folder / "deep/tiny.gguf")
    return "own/tiny-GGUF/deep/tiny.gguf"


def test_a_gguf_file_comes_from_the_hub(original, on_hub, file, hub):
    loaded = LanguageModel.load(on_hub)
    assert loaded.identity == {"name": on_hub, "fingerprint": original.identity["fingerprint"]}
    assert local_name(on_hub) == on_hub
    other = hub.model("own/tiny-GGUF@v1") / "deep"
    other.mkdir(exist_ok=True)
    changed = LanguageModel.load(str(file))
    changed.model.lm_head.weight *= 2
    write_gguf(changed, other / "tiny.gguf")
    assert LanguageModel.load(on_hub, revision="v1").identity["fingerprint"] == changed.identity["fingerprint"]
    for name, revision, sentence in (
        (on_hub, "v9", "the Hub has it, but not that revision"),
        (on_hub.replace("tiny.", "other."), None, "the Hub has it, but without the file that is needed"),
        ("own/nothing-GGUF/tiny.gguf", None, "the Hub has nothing of that name for you"),
    ):
        with pytest.raises(UserError, match=f"the model '{name}' could not be loaded .*{sentence}"):
            LanguageModel.load(name, revision=revision)


def test_without_a_network_a_missing_file_is_named(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="it is not in the local cache and the Hub cannot be reached"):
        LanguageModel.load("own/never-seen-GGUF/tiny.gguf")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["tiny.gguf", "models/tiny.gguf", "./models/own/tiny.gguf", "/models/own/tiny.gguf"])
def test_a_file_that_is_not_there_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"there is no file '{name}'. Set model.llm to the path of a GGUF file"):
        LanguageModel.load(name)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named(file, package, monkeypatch):
    monkeypatch.setattr(subject, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(UserError, match="need the 'gguf' extra: pip install 'corrsteer_pl.gguf.'"):
        LanguageModel.load(str(file))


def test_an_architecture_that_transformers_cannot_read_is_named(original, tmp_path):
    path = write_gguf(original, tmp_path / "x.gguf", architecture="plamo")
    with pytest.raises(UserError, match=r"the file .* could not be loaded .*architecture plamo is not supported"):
        LanguageModel.load(str(path))


def test_a_file_without_tokenizer_is_refused(original, tmp_path):
    path = write_gguf(original, tmp_path / "x.gguf", with_tokenizer=False)
    with pytest.raises(UserError, match=r"the GGUF file .*x.gguf has no tokenizer"):
        LanguageModel.load(str(path))


def test_a_tokenizer_that_lacks_its_own_tokens_is_refused(original, tmp_path):
    path = write_gguf(original, tmp_path / "x.gguf", bos=10**6)
    with pytest.raises(UserError, match=r"x.gguf' could not be loaded .*its tokenizer cannot be read: IndexError"):
        LanguageModel.load(str(path))


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.1, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_refused(file, tmp_path, share):
    content = file.read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(content[: max(5, int(share * len(content)))])
    with pytest.raises(UserError, match=r"the GGUF file .*x.gguf is cut short or damaged. Download it again"):
        LanguageModel.load(str(path))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no GGUF file: it does not begin with GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is no GGUF file: it does not begin with GGUF"),
        (b"GGUF" + bytes([1, 0, 0, 0]) + bytes(40), "is GGUF of version 1; 2 and 3 can be read"),
        (b"GGUF" + bytes([3, 0, 0, 0]) + b"\xff" * 60, "is cut short or damaged"),
    ],
)
def test_what_is_no_gguf_file_is_refused(content, sentence, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        LanguageModel.load(str(path))


def test_a_missing_weight_is_named(original, tmp_path):
    path = write_gguf(original, tmp_path / "x.gguf", without=["blk.1.ffn_up.weight"])
    with pytest.raises(UserError, match=r"lacks 1 of its weights \(model.layers.1.mlp.up_proj.weight\)"):
        LanguageModel.load(str(path))


def test_scaled_rotary_frequencies_are_warned_of(original, tmp_path):
    path = write_gguf(original, tmp_path / "x.gguf", extra={"rope_freqs.weight": torch.ones(4)})
    with pytest.warns(UserWarning, match="scales its rotary frequencies"):
        LanguageModel.load(str(path))


def test_a_gguf_file_is_not_quantised_again(file, tmp_path):
    with pytest.raises(UserError, match=r"model.llm_args.quantize is 4, but .* is a GGUF file"):
        LanguageModel.load(str(file), quantize=4)
    with pytest.raises(UserError, match="Disk offload is not supported for models loaded from GGUF files"):
        LanguageModel.load(str(file), device_map={"": "disk"}, offload_folder=str(tmp_path))


def test_a_folder_may_end_in_gguf(original, tmp_path):
    folder = shutil.copytree(original.name, tmp_path / "folder.gguf")
    assert LanguageModel.load(str(folder)).identity["fingerprint"] == original.identity["fingerprint"]


# ---------------------------------------------------------------- a real one


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="make smollm2 brings the file")
def test_a_real_instruction_model_answers():
    llm = LanguageModel.load(str(REAL))
    ids = torch.tensor([llm.prompt_ids(["What is the capital of France?"], chat=True)])
    answer = llm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert (
        llm.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True) == "The capital of France is Paris."
    )
