"""A folder with an adapter of peft is the merged model, as peft merges it, or is rejected."""

import copy
import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import (
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from corrsteer_pl import demo
from corrsteer_pl.errors import UserError
from corrsteer_pl.models import llm_loading
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.peft_loading import find_adapter, merge_adapter, require_merged
from tests.architectures import NEW, PROMPTS, batch_of, hf_texts, make_tiny
from tests.conftest import run_here

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LINEAR = ["q_proj", "v_proj", "down_proj"]


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **options})


MERGEABLE = {
    "lora": lora(),
    "no_task_type": lora(task_type=None, layers_to_transform=[1]),
    "rank_pattern": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}),
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True),
    "lora_bias": lora(lora_bias=True),
    "all_linear": lora(target_modules="all-linear"),
    "modules_to_save": lora(modules_to_save=["lm_head", "input_layernorm"]),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "trainable_tokens": lora(trainable_token_indices={"embed_tokens": [3, 17, 250]}),
    "target_parameters": lora(target_modules=["q_proj"], target_parameters=["mlp.down_proj.weight"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "beft": BeftConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"),
    "loha": LoHaConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "ln_tuning": LNTuningConfig(target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, llm):
    return save_base(tmp_path_factory.mktemp("base"), "llama", llm)


def save_base(folder, name, llm):
    make_tiny(name, llm.tokenizer).model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base, config, folder, seed=1):
    """An adapter with random values in all of its parameters, saved by peft."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    return folder


def by_peft(base, folder):
    """The model with the adapter active, not merged, as peft loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


@torch.no_grad()
def logits(model):
    return torch.cat([model(input_ids=torch.tensor([prompt])).logits[0, -1:] for prompt in PROMPTS])


def assert_same_model(llm, reference, base):
    expected, scale = logits(reference), logits(reference).abs().max()
    unchanged = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (expected - unchanged[:, : expected.shape[1]]).abs().max() > 1e-2 * scale
    torch.testing.assert_close(logits(llm.model) / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MERGEABLE)
def test_the_model_is_the_adapted_one(name, base, tmp_path):
    folder = save_adapter(base, MERGEABLE[name], tmp_path / "adapter")
    llm = LanguageModel.load(str(folder))
    reference = by_peft(base, folder)
    assert_same_model(llm, reference, base)
    assert not any(isinstance(module, BaseTunerLayer) for module in llm.model.modules())
    assert not any(parameter.requires_grad for parameter in llm.model.parameters())
    # The identity is that of the merged model, and not that of the base.
    assert llm.identity["fingerprint"] == LanguageModel.load(str(folder)).identity["fingerprint"]
    assert llm.identity["fingerprint"] != LanguageModel.load(str(base)).identity["fingerprint"]
    # A saved model keeps what the adapter changed.
    llm.model.save_pretrained(tmp_path / "merged")
    scale = logits(reference).abs().max()
    saved = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(saved / scale, logits(reference) / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "targets"),
    {"gpt2": ["c_attn", "c_fc"], "gpt_neox": ["query_key_value"], "qwen2": LINEAR, "gemma2": LINEAR}.items(),
)
def test_other_architectures_generate_as_peft_does(name, targets, llm, tmp_path):
    base = save_base(tmp_path / "base", name, llm)
    folder = save_adapter(base, lora(target_modules=targets, fan_in_fan_out=name == "gpt2"), tmp_path / "adapter")
    loaded, reference = LanguageModel.load(str(folder)), by_peft(base, folder)
    assert_same_model(loaded, reference, base)
    texts = Decoder(loaded, NEW).generate(batch_of(loaded))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = reference.generate(input_ids=torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0]
        assert text == llm.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_tied_embeddings_are_changed_as_the_adapter_says(option, targets, tmp_path):
    config = lora(**{"target_modules": ["v_proj"], option: targets})
    folder = save_adapter(demo.MODEL, config, tmp_path / "adapter")
    llm, reference = LanguageModel.load(str(folder)), by_peft(demo.MODEL, folder)
    assert_same_model(llm, reference, demo.MODEL)
    llm.model.save_pretrained(tmp_path / "merged")
    scale = logits(reference).abs().max()
    saved = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(saved / scale, logits(reference) / scale, rtol=0, atol=1e-5)


def test_a_tokenizer_beside_the_adapter_comes_with_its_tokens(base, llm, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>", "<newer>"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    folder = tmp_path / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, lora()).save_pretrained(folder, save_embedding_layers=True)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    loaded = LanguageModel.load(str(folder))
    assert loaded.has_chat_template
    assert loaded.tokenizer.convert_tokens_to_ids("<newer>") == len(tokenizer) - 1
    torch.testing.assert_close(loaded.model.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_tokens_without_trained_embeddings_are_never_the_likeliest(base, tmp_path):
    folder = save_adapter(base, lora(), tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(folder)
    loaded, rows = LanguageModel.load(str(folder)), len(AutoTokenizer.from_pretrained(base))
    assert len(loaded.model.get_input_embeddings().weight) == rows + 1 == len(tokenizer)
    expected, found = logits(by_peft(base, folder)), logits(loaded.model)
    scale = expected.abs().max()
    torch.testing.assert_close(found[:, :rows] / scale, expected[:, :rows] / scale, rtol=0, atol=1e-5)
    assert (found.argmax(-1) < rows).all()
    fingerprints = {LanguageModel.load(str(folder)).identity["fingerprint"] for _ in range(2)}
    assert fingerprints == {loaded.identity["fingerprint"]}


def configure(folder, file="adapter_config.json", **settings):
    before = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**before, **settings}), encoding="utf-8")


def test_a_relative_base_starts_at_the_working_directory_or_the_adapter(base, tmp_path, monkeypatch):
    folder = save_adapter(base, lora(), tmp_path / "run/adapter")
    expected = LanguageModel.load(str(folder)).identity["fingerprint"]
    shutil.copytree(base, tmp_path / "model")
    configure(folder, base_model_name_or_path="../../model")
    assert LanguageModel.load(str(folder)).identity["fingerprint"] == expected
    configure(folder, base_model_name_or_path="model")
    monkeypatch.chdir(tmp_path)
    assert LanguageModel.load("run/adapter").identity["fingerprint"] == expected


def test_an_adapter_of_an_adapter_has_both(base, tmp_path):
    first = save_adapter(base, lora(), tmp_path / "first")
    merged = by_peft(base, first).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    second = save_adapter(tmp_path / "merged", lora(), tmp_path / "second", seed=2)
    expected = by_peft(tmp_path / "merged", second)
    configure(second, base_model_name_or_path=str(first))
    assert_same_model(LanguageModel.load(str(second)), expected, tmp_path / "merged")
    configure(first, base_model_name_or_path=str(second))
    with pytest.raises(UserError, match="each other's base models"):
        LanguageModel.load(str(second))


def other_tokenizer(folder):
    tokens = AutoTokenizer.from_pretrained(demo.MODEL)
    described = json.loads(tokens.backend_tokenizer.to_str())
    model = described["model"]
    last = len(model["vocab"]) - 1
    model["vocab"] = {token: last - index for token, index in model["vocab"].items()}
    described["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")


def change_weights(change):
    def changed(folder):
        weights = load_file(folder / "adapter_model.safetensors")
        change(weights)
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})

    return changed


def become(config):
    """Replace the adapter by one of another configuration."""

    def changed(folder):
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        shutil.rmtree(folder)
        save_adapter(base, config, folder)

    return changed


def settings(**changed):
    return lambda folder: configure(folder, **changed)


def write(file, content):
    return lambda folder: (folder / file).write_bytes(content)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT, PREFIX = (
    kind(num_virtual_tokens=4, task_type="CAUSAL_LM") for kind in (PromptTuningConfig, PrefixTuningConfig)
)
UNFIT = "does not fit its base model"
BROKEN = {
    "prompt_tuning": (become(PROMPT), "PROMPT_TUNING"),
    "prefix_tuning": (become(PREFIX), "PREFIX_TUNING"),
    "alora": (become(lora(alora_invocation_tokens=[5, 6])), "cannot be merged"),
    "no_base": (settings(base_model_name_or_path=None), "base_model_name_or_path None"),
    "absent_base": (settings(base_model_name_or_path="/nowhere/model"), "'/nowhere/model'"),
    "absent_relative_base": (settings(base_model_name_or_path="./model"), "'./model'"),
    "task": (settings(task_type="SEQ_CLS"), "SEQ_CLS"),
    "type": (settings(peft_type="NEW_KIND"), "NEW_KIND"),
    "json": (write(CONFIG, b"[]"), "adapter_config.json describes no adapter"),
    "no_weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "bad_weights": (write(WEIGHTS, b"junk"), "cannot be read"),
    "missing_key": (change_weights(lambda weights: weights.pop(KEY)), r"layers.1.self_attn.q_proj.lora_A"),
    "unknown_key": (change_weights(lambda w: w.update({KEY.replace(".1.", ".9."): torch.ones(4, 32)})), "layers.9"),
    "shape": (change_weights(lambda weights: weights.update({KEY: torch.ones(8, 32)})), UNFIT),
    "not_finite": (change_weights(lambda weights: weights[KEY].fill_(torch.nan)), "cannot be merged"),
    "other_targets": (settings(target_modules=["of_another_model"]), UNFIT),
    "tokenizer": (other_tokenizer, "differs from that of the base model"),
    "complete_model": (write("model.safetensors", b""), "complete model and an adapter"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_merged_is_rejected_by_name(name, base, tmp_path):
    folder = save_adapter(base, lora(), tmp_path / "adapter")
    change, message = BROKEN[name]
    change(folder)
    with pytest.raises(UserError, match=message) as raised:
        LanguageModel.load(str(folder))
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_options_that_prevent_a_merge_are_rejected(base, tmp_path):
    folder = save_adapter(base, lora(), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"model.llm_args.quantize is 4.*Merge it first"):
        LanguageModel.load(str(folder), quantize=4)
    with pytest.raises(UserError, match=r"device_map offloads.*Merge it first"):
        LanguageModel.load(str(folder), device_map={"": "disk"}, offload_folder=str(tmp_path / "away"))


def test_a_quantised_base_model_is_rejected(base, tmp_path):
    folder = save_adapter(base, lora(), tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.hf_quantizer, model.is_quantized = object(), True
    with pytest.raises(UserError, match="quantised base model"):
        merge_adapter(model, find_adapter(str(folder), None), 0)


def test_several_adapters_in_a_folder_are_listed(base, tmp_path):
    for name in ("one", "two"):
        save_adapter(base, lora(), tmp_path / name)
    with pytest.raises(UserError, match="/one, .*/two"):
        LanguageModel.load(str(tmp_path))


def test_without_peft_the_extra_is_named(base, tmp_path, monkeypatch):
    folder = save_adapter(base, lora(), tmp_path / "adapter")
    monkeypatch.setattr(llm_loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"corrsteer_pl\[peft\]"):
        LanguageModel.load(str(folder))


def test_layers_of_peft_in_a_loaded_model_are_rejected(base):
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj that is not merged"):
        require_merged(get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora()), "tiny")


# ---------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """An adapter on the shipped model, and the same as a merged model."""
    folder = tmp_path_factory.mktemp("adapted")
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(demo.MODEL, config, folder / "adapter")
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    save_file({name: weight / 4 for name, weight in weights.items()}, folder / "adapter/adapter_model.safetensors")
    by_peft(demo.MODEL, folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(demo.MODEL).save_pretrained(folder / "merged")
    return folder


SMALL = ["--data.train_size=40", "--data.val_size=20", "--data.test_size=30", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize(
    ("method", "options"),
    {
        "finetune": ["--model.adapter=lora", "--model.lr=0.001"],
        "corrsteer": ["--model.saes=demo", "--model.layers=[1,2]", "--model.check_alignment=off"],
    }.items(),
)
@pytest.mark.filterwarnings("ignore")
def test_runs_are_those_of_the_merged_model(method, options, adapted, tmp_path):
    results = {}
    for name in ("adapter", "merged"):
        folder = tmp_path / name
        given = ["--method", method, f"--model.llm={adapted / name}", f"--trainer.default_root_dir={folder}"]
        run_here("fit", *given, *options, *SMALL, cwd=tmp_path)
        run_here("test", "--ckpt_path", folder / "last.ckpt", "--trainer.enable_progress_bar=false", cwd=tmp_path)
        (metrics,) = folder.glob("test/*/metrics.json")
        results[name] = json.loads(metrics.read_text(encoding="utf-8"))
    for key in ("n", "reward_baseline", "reward_steered", "changed"):
        assert results["adapter"][key] == results["merged"][key]
    # A checkpoint recognises the model that it was fitted on, and no other.
    last = tmp_path / "adapter/last.ckpt"
    with pytest.raises(AssertionError):
        run_here("test", "--ckpt_path", last, "--model.llm=demo", cwd=tmp_path)
    if method == "finetune":
        written = json.loads((tmp_path / "adapter/adapter/adapter_config.json").read_text(encoding="utf-8"))
        assert (written["r"], written["base_model_name_or_path"]) == (8, str(adapted / "adapter"))
    run_here("export", tmp_path / "adapter", "--to", "merged", cwd=tmp_path)


def test_exported_adapters_load_as_the_exported_model(tmp_path):
    """Of a run that steers (biases) and one that trains (low-rank matrices), against the merged export of each."""
    common = ["--model.llm=demo", *SMALL]
    steer = ["--model.saes=demo", "--model.layers=[1,2]", "--model.rule=all"]
    run_here("fit", *common, *steer, "--trainer.default_root_dir=steer", cwd=tmp_path)
    tune = ["--method=finetune", "--model.adapter=lora", "--model.lr=0.01"]
    run_here("fit", *common, *tune, "--trainer.default_root_dir=tune", cwd=tmp_path)
    for run, adapter in (("steer", "steer/export/peft"), ("tune", "tune/adapter")):
        run_here("export", tmp_path / run, "--to", "merged", cwd=tmp_path)
        if run == "steer":
            run_here("export", tmp_path / run, "--to", "peft", cwd=tmp_path)
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / run / "export/merged")
        loaded = LanguageModel.load(str(tmp_path / adapter))
        assert_same_model(loaded, reference, demo.MODEL)
        batch = batch_of(loaded)
        texts = hf_texts(SimpleNamespace(model=reference, tokenizer=loaded.tokenizer), batch)
        assert Decoder(loaded, NEW).generate(batch) == texts
