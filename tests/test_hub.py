"""Everything that comes from the Hugging Face Hub, from a small one on loopback."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from corrsteer_pl import TaskDataModule
from corrsteer_pl.cli.program import main
from corrsteer_pl.errors import UserError
from corrsteer_pl.hub import HTTP_ERROR, reason
from corrsteer_pl.models.alignment import alignments
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae import saes_identity
from corrsteer_pl.models.sae_loading import load_saes
from corrsteer_pl.rewards.judges import REJECTION, SIMILARITY, RefusalReward, SimilarityReward
from tests.conftest import CONFIGS, cli, make_sae
from tests.hub.autoencoders import add_sae_lens
from tests.hub.language_models import probes

pytestmark = pytest.mark.filterwarnings(
    # Two or three thin blocks stand for the real depth; base models answer benchmarks.
    "ignore:.* has SAEs for layers up to:UserWarning",
    "ignore:the prompts of .* are instructions:UserWarning",
)
SETTINGS = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(CONFIGS.glob("*.yaml"))}
TASKS = [
    name
    for name, s in SETTINGS.items()
    if "task" in s.get("data", {}) and s.get("model", {}).get("llm") != "demo" and "method" not in s
]
OTHERS = [name for name, s in SETTINGS.items() if s.get("method") and s["model"]["llm"] != "demo"]
PRESETS = [name for name, s in SETTINGS.items() if "task" not in s.get("data", {})]
# Their SAEs are in a folder that the user makes.
TRAIN_FIRST = ("smollm2_135m.yaml",)
# The main branch under another name.
BRANCH = "refs/heads/main"
LIMITS = ["--data.train_size=48", "--data.val_size=8", "--data.test_size=16", "--data.batch_size=16"]


# Their answers are long, and a model of noise never ends one.
LONG = ("gsm8k.yaml", "harmbench.yaml", "ifeval.yaml", "simpleqa.yaml", "xstest.yaml")


@pytest.fixture
def here(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "any")
    return tmp_path


def run(configs, *options):
    named = [part for name in configs for part in ("--config", name)]
    assert main(["fit", *named, *LIMITS, "--trainer.enable_progress_bar=false", *options]) == 0
    (folder,) = Path("checkpoints").iterdir()
    assert main(["test", "--ckpt_path", str(folder / "last.ckpt"), "--trainer.enable_progress_bar=false"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_task_config_fits_and_tests(name, here):
    configs = [name] if "model" in SETTINGS[name] else [name, "gemma2_2b.yaml"]
    # Every SAE is large, so only one task reads more than one.
    layers = [0, 1] if name == "mmlu.yaml" else [1]
    short = ["--data.task_args.max_new_tokens=8"] if name in LONG else []
    folder = run(configs, f"--model.layers={layers}", *short)
    selection = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
    assert selection["llm"]["name"] == "google/gemma-2-2b-it"
    assert selection["samples"] == 48
    assert {f["layer"] for f in selection["ranking"]} <= set(layers)
    # JumpReLU SAEs of 16,384 x 2,304: seven sums a feature, and a direction for each candidate.
    stored = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"].values()
    sums = sum(tensor.nbytes for tensor in stored)
    assert sums >= len(layers) * 16384 * 7 * 8
    # What a score that needs histograms leaves is a number for each feature.
    settled = SETTINGS[name].get("model", {}).get("score") in ("mutual_information", "auroc")
    scores = len(layers) * 16384 * 8 if settled else 0
    assert (folder / "last.ckpt").stat().st_size < 1.1 * sums + scores
    for feature in selection["candidates"]:
        layer, index = feature["layer"], feature["index"]
        expected = f"https://www.neuronpedia.org/gemma-2-2b/{layer}-gemmascope-res-16k/{index}"
        assert feature["neuronpedia"] == expected
    (metrics,) = folder.glob("test/*/metrics.json")
    assert json.loads(metrics.read_text(encoding="utf-8"))["n"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_config_of_another_method_fits_and_tests(name, here):
    # Two thin blocks stand for the real depth, and noise has no salient feature to speak of.
    crisp = ["--model.layers=[1]", "--model.adapter_layers=[0,1]", "--model.least_ratio=1.01", "--model.k=4"]
    rosi = ["--model.topm=2", "--model.strengths=[1,4]", "--data.task_args.max_new_tokens=8", "--model.positions=2"]
    # The blocks of these models write almost nothing along the mean.
    rosi += ["--model.form=projection"]
    options = {"crisp": crisp, "rosi": rosi}.get(SETTINGS[name]["method"], ["--model.adapter=lora"])
    folder = run([name], *options)
    selection = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
    assert selection["llm"]["name"] == "google/gemma-2-2b-it"
    assert selection["samples"] == 48
    # Low-rank matrices beside 2,304 x 16,384 of an SAE, or the sums of two layers: no weight of the model.
    assert (folder / "last.ckpt").stat().st_size < 5_000_000
    (metrics,) = folder.glob("test/*/metrics.json")
    assert json.loads(metrics.read_text(encoding="utf-8"))["n"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_and_tests(name, here):
    saes = SETTINGS[name]["model"]["saes"]
    if name in TRAIN_FIRST:
        identity = torch.cat([torch.eye(64), -torch.eye(64)], 1)
        for layer in (0, 1):
            make_sae(here / saes, layer, identity, identity.T)
    folder = run(["mmlu.yaml", name])
    assert folder.name == f"mmlu-{Path(name).stem}"
    selection = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
    assert selection["llm"]["name"] == SETTINGS[name]["model"]["llm"]
    assert selection["saes"]["name"] == (str(here / saes) if name in TRAIN_FIRST else saes)


def refused(capsys, *args):
    assert main([*args, "--trainer.enable_progress_bar=false"]) == 2
    error = capsys.readouterr().err
    (sentence,) = [line for line in error.splitlines() if line.startswith("error:")]
    assert "Traceback" not in error
    return sentence


MMLU = ["fit", "--config", "mmlu.yaml", *LIMITS]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model.llm", "google/gemma-2-2b-itt"], "the Hub has nothing of that name for you"),
        (["--model.llm_args.revision", "v9"], "not that revision"),
        (["--model.saes", "gemma-scope-2b-pt-rez"], "(the nearest are gemma-scope-2b-pt-res"),
        (["--model.saes", "owner/nothing"], "the SAEs 'owner/nothing' could not be found"),
        (["--model.sae_id", "layer_{layer}/width_17k/canonical"], "Set model.sae_id to one of layer_{layer}/width_16k"),
        (["--model.sae_id", "null"], "has several SAEs for a layer. Set model.sae_id to one of"),
        (["--model.saes", "gemma-scope-2b-pt-att-canonical"], "'blocks.0.attn.hook_z', which cannot be steered here"),
        (["--model.layers", "[7]"], "layer 7 is not in google/gemma-2-2b-it (layers 0..1)"),
        (["--data.path", "owner/nothing"], "the data set 'owner/nothing' could not be loaded from the"),
        (["--data.path", "allenai/ai2_arc"], "it has the subsets ARC-Challenge, ARC-Easy; set data.subset to one"),
        (["--data.subset", "none"], "it has the subsets all; set data.subset to one"),
        (["--data.revision", "v9"], "'cais/mmlu' could not be loaded from the Hugging Face Hub (the Hub has it, but n"),
        (["--data.test_split", "tets"], "it has the splits auxiliary_train, validation, test, dev; set data.train"),
        (["--data.test_split", "test[:9]+tets"], "it has the splits auxiliary_train, validation, test, dev; set data."),
        (["--data.train_split", "trein"], "it has the splits auxiliary_train, validation, test, dev; set data.train"),
        (["--data.path", "changed/mmlu"], "column 'question' is not in the data (columns: query, subject, choices"),
        (["--data.filter", "{subjekt: x}"], "data.filter names the column 'subjekt', which is not in the data"),
        (["--data.filter", "{subject: anatomie}"], "data.filter wants subject 'anatomie', which no row has"),
        (
            ["--model.llm", "openai-community/gpt2", "--data.chat_template", "true"],
            "data.chat_template is true, but the tokenizer of openai-community/gpt2 has no chat template",
        ),
        (
            ["--model.llm_args.device_map", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp_spawn"],
            "model.llm_args.device_map is 'cpu', which spreads one model over all devices, but 2 processes would",
        ),
        (["--model.llm_args.quantize", "4"], "quantised models need the 'quant' extra: pip install"),
        (["--model.llm_args.quantize", "5"], "choose 4 or 8 bits"),
        (["--model.llm_args.nix", "5"], "model.llm_args has no option 'nix'; it takes revision, attn_implementation"),
        (["--model.llm_args.blocks", "model.layer"], "there are model.layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_one_sentence(options, sentence, here, hub, capsys):
    prepare_broken(hub)
    assert sentence in refused(capsys, *MMLU, *options)


def prepare_broken(hub):
    from tests.hub.contents import add_dataset, mmlu_rows

    if "walledai/private" in hub.gated:
        return
    hub.gated.add("walledai/private")
    (hub.model("walledai/private") / "config.json").write_text("{}", encoding="utf-8")
    add_dataset(hub, "walledai/private", {"all": {"auxiliary_train": mmlu_rows(5, "private")}})
    rows = [{"query" if k == "question" else k: v for k, v in row.items()} for row in mmlu_rows(20, "auxiliary_train")]
    add_dataset(hub, "changed/mmlu", {"all": {"auxiliary_train": rows, "validation": rows, "test": rows}})
    repository, names = hub.model("google/gemma-scope-2b-pt-att"), "w_enc w_dec b_enc b_dec threshold"
    shapes = [(2048, 16384), (16384, 2048), (16384,), (2048,), (16384,)]
    for folder in ("layer_0/width_16k/average_l0_104", "layer_1/width_16k/average_l0_79"):
        (repository / folder).mkdir(parents=True)
        arrays = {name: np.zeros(shape, np.float32) for name, shape in zip(names.split(), shapes, strict=True)}
        np.savez_compressed(repository / folder / "params.npz", **arrays)


def test_what_is_gated_says_how_to_get_it(here, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    prepare_broken(hub)
    for options in (["--data.path", "walledai/private", "--data.subset", "all"], ["--model.llm", "walledai/private"]):
        sentence = refused(capsys, *MMLU, *options)
        assert "'walledai/private' could not be loaded" in sentence
        assert (
            "it is gated: accept its terms on huggingface.co, then log in with 'hf auth login' or set HF_TO" in sentence
        )


def test_without_a_network_what_is_cached_is_used_and_what_is_missing_is_named(here, hub):
    quiet = "--trainer.enable_progress_bar=false"
    args = ["fit", "--config", "mmlu.yaml", "--config", "pythia_70m.yaml", *LIMITS, quiet]
    nowhere = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "1"}
    missing = cli(*args, cwd=here, env={**nowhere, "HF_HOME": str(here / "empty")}, check=False)
    assert missing.returncode == 2
    (sentence,) = [line for line in missing.stderr.splitlines() if line.startswith("error:")]
    assert "it is not in the local cache and the Hub cannot be reached" in sentence
    assert "Traceback" not in missing.stderr
    assert reason(HTTP_ERROR("Connection refused")) == reason(ConnectionError())
    # What this process has loaded lies in the cache of the tests.
    assert main(args) == 0
    cli(*args, cwd=here, env=nowhere)


@pytest.mark.filterwarnings("ignore:the prompts of mmlu are instructions")
def test_a_base_model_given_instructions_is_warned_of(here):
    options = ["--model.llm=EleutherAI/pythia-70m-deduped", "--model.saes=pythia-70m-deduped-res-sm"]
    with pytest.warns(
        UserWarning, match="EleutherAI/pythia-70m-deduped has no chat template, so it is probably a base"
    ):
        main([*MMLU, *options, "--model.sae_id=blocks.{layer}.hook_resid_post", "--trainer.enable_progress_bar=false"])


@pytest.mark.parametrize(
    ("release", "sae_id", "llm", "site", "count"),
    [
        (
            "gemma-scope-2b-pt-res-canonical", "layer_{layer}/width_16k/canonical",
            "google/gemma-2-2b-it", "resid_post", 2,
        ),
        ("gemma-scope-2-1b-it-res-all", "layer_{layer}_width_16k_l0_small", "google/gemma-3-1b-it", "resid_post", 2),
        ("llama_scope_lxr_8x", None, "meta-llama/Llama-3.1-8B", "resid_post", 2),
        ("qwen-scope-3-1.7b-base-w32k-l50", None, "Qwen/Qwen3-1.7B-Base", "resid_post", 1),
        ("gpt2-small-res-jb", None, "openai-community/gpt2", "resid_pre", 2),
        ("pythia-70m-deduped-res-sm", None, "EleutherAI/pythia-70m-deduped", "resid_post", 2),
        ("own/gated", None, "meta-llama/Llama-3.1-8B", "resid_post", 2),
        ("own/topk", "topk/{layer}", "meta-llama/Llama-3.1-8B", "mlp_out", 2),
        ("own/jumprelu", None, "meta-llama/Llama-3.1-8B", "attn_out", 2),
    ],
)  # fmt: skip
def test_every_family_of_saes_is_loaded_and_fits(release, sae_id, llm, site, count, hub):
    if release.startswith("own/"):
        architecture = release.removeprefix("own/")
        folders = {f"{architecture}/{layer}": f"blocks.{layer}.hook_{site}" for layer in (0, 1)}
        add_sae_lens(hub, release, folders, architecture=architecture)
    model = LanguageModel.load(llm)
    saes = load_saes(release, model, sae_id=sae_id)
    assert list(saes) == list(range(count))
    ids, mask = model.left_pad([model.token_ids(text) for text in probes(8)])
    for layer, fit in alignments(model, saes, SimpleNamespace(input_ids=ids, attention_mask=mask)).items():
        assert fit.site == f"blocks.{layer}.hook_{site}"
        assert fit.explained > 0.9
        assert fit.problem is None


@pytest.mark.parametrize(
    ("release", "sae_id", "llm", "repository"),
    [
        ("gemma-scope-2b-pt-res-canonical", "layer_{layer}/width_16k/canonical", "google/gemma-2-2b-it",
         "google/gemma-scope-2b-pt-res"),
        ("llama_scope_lxr_8x", None, "meta-llama/Llama-3.1-8B", "fnlp/Llama3_1-8B-Base-LXR-8x"),
        ("own/pinned", None, "meta-llama/Llama-3.1-8B", "own/pinned"),
    ],
)  # fmt: skip
def test_saes_are_loaded_at_a_revision(release, sae_id, llm, repository, hub):
    if release == "own/pinned":
        add_sae_lens(hub, release, {"saes/0": "blocks.0.hook_resid_post"})
    model = LanguageModel.load(llm)
    newest = load_saes(release, model, [0], sae_id=sae_id)
    hub.requests.clear()
    pinned = load_saes(release, model, [0], sae_id=sae_id, revision=BRANCH)
    assert saes_identity(release, pinned) == saes_identity(release, newest)
    asked = [path for path in hub.requests if f"/{repository}/" in path]
    assert asked
    assert all(BRANCH.replace("/", "%2F") in path for path in asked)
    sha = HfApi(hub.endpoint).model_info(repository).sha
    pinned = load_saes(release, model, [0], sae_id=sae_id, revision=sha)
    assert saes_identity(release, pinned) == saes_identity(release, newest)
    with pytest.raises(UserError, match="the Hub has it, but not that revision"):
        load_saes(release, model, [0], sae_id=sae_id, revision="v9")
    hub.requests.clear()
    load_saes(release, model, [0], sae_id=sae_id)
    assert not any(BRANCH.replace("/", "%2F") in path for path in hub.requests)


def test_a_folder_of_saes_has_no_revision(hub):
    with pytest.raises(UserError, match="the revision 'v1' is asked for of the SAEs 'demo', which are a folder"):
        load_saes("demo", LanguageModel.load("demo"), revision="v1")


def test_saes_trained_on_a_centred_stream_read_a_centred_stream(hub):
    model = LanguageModel.load("openai-community/gpt2")
    sae = load_saes("gpt2-small-res-jb", model)[1]
    residual = torch.randn(3, 64) + 5
    centred = residual - residual.mean(-1, keepdim=True)
    torch.testing.assert_close(sae.encode(residual), sae.sae.encode(centred))
    assert sae.page(5) == "https://www.neuronpedia.org/gpt2-small/1-res-jb/5"


def test_judges_come_from_the_hub_and_decide(hub):
    texts = probes(40)
    refusal = RefusalReward(REJECTION)
    refusal.load("cpu")
    refused_texts = refusal.refused([*texts, ""])
    assert refused_texts[-1] is False
    direct = pipeline("text-classification", model=REJECTION)
    assert refused_texts[:-1] == [found["label"] == "REJECTION" for found in direct(texts)]
    assert 0 < sum(refused_texts) < 40
    rewards = refusal(texts, ["refuse"] * 40)
    assert rewards == [1 - reward for reward in refusal(texts, ["comply"] * 40)]

    similarity = SimilarityReward(SIMILARITY, 0.6)
    similarity.load("cpu")
    golds = texts[::-1]
    model = AutoModelForSequenceClassification.from_pretrained(SIMILARITY)
    tokenizer = AutoTokenizer.from_pretrained(SIMILARITY)
    lines = [text.splitlines()[0] for text in texts]
    pairs = [tokenizer(line, gold, return_tensors="pt") for line, gold in zip(lines, golds, strict=True)]
    expected = [float(torch.sigmoid(model(**pair).logits).item() >= 0.6) for pair in pairs]
    assert similarity(texts, golds) == expected
    assert 0 < sum(expected) < 40
    with pytest.raises(UserError, match="has 2 outputs, but a cross-encoder of similarity has one"):
        SimilarityReward(REJECTION).load("cpu")


def test_a_chat_template_writes_bos_once_and_shots_are_turns(hub):
    data = TaskDataModule("mmlu", shots=2, train_size=8, val_size=4, test_size=4)
    data.setup("fit")
    example, llm = data.examples["validation"][0], LanguageModel.load("google/gemma-2-2b-it")
    first, second = data.shots
    assert not {first.prompt, second.prompt} & {e.prompt for e in data.examples["train"]}
    turns = data.turns(example)
    plain = llm.tokenizer.decode(llm.prompt_ids(turns, chat=False))
    assert plain == f"<bos>{first.prompt} {first.gold}\n\n{second.prompt} {second.gold}\n\n{example.prompt}"
    chat = llm.tokenizer.decode(llm.prompt_ids(turns, chat=True))
    assert chat == "<bos>" + "".join(
        f"<start_of_turn>user\n{shot.prompt}<end_of_turn>\n<start_of_turn>model\n{shot.gold}<end_of_turn>\n"
        for shot in data.shots
    ) + f"<start_of_turn>user\n{example.prompt}<end_of_turn>\n<start_of_turn>model\n"  # fmt: skip
    assert data.uses_chat(llm)
    assert data.answers(llm) == ["A", "B", "C", "D"]
    base = LanguageModel.load("EleutherAI/pythia-70m-deduped")
    assert not data.uses_chat(base)
    assert data.answers(base) == [" A", " B", " C", " D"]
    # A template that leaves BOS to the tokenizer gets it all the same.
    llm.tokenizer.chat_template = llm.tokenizer.chat_template.replace("{{ bos_token }}", "")
    assert llm.tokenizer.decode(llm.prompt_ids(turns, chat=True)) == chat


def test_the_published_splits_are_counted(hub):
    sizes = {}
    for task, total in (("harmbench", 400), ("xstest", 450)):
        data = TaskDataModule(task)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_TOKEN", "any")
            data.setup("fit")
        sizes[task] = [len(data.examples[split]) for split in ("train", "validation", "test")]
        assert sum(sizes[task]) == total
    assert sizes == {"harmbench": [108, 12, 280], "xstest": [121, 14, 315]}


def test_a_data_set_is_read_at_its_revision(hub):
    from tests.hub.contents import add_dataset, mmlu_rows

    for name, word in (("own/pinned", "new"), ("own/pinned@v1", "old")):
        add_dataset(hub, name, {"all": {split: mmlu_rows(9, f"{word} {split}") for split in ("train", "dev", "test")}})

    def words(**options):
        splits = {"train_split": "train", "val_split": "dev", "test_split": "test"}
        data = TaskDataModule("mmlu", "own/pinned", subset="all", **splits, **options)
        data.setup("fit")
        found = [{re.search("in (old|new) ", e.prompt)[1] for e in some} for some in data.examples.values()]
        return [word for (word,) in found]

    assert words() == ["new"] * 3
    assert words(revision="v1") == ["old"] * 3
    fit_on = {"task": "mmlu", "path": "own/pinned", "subset": "all", "revision": "v1"}
    assert words(fit_on={**fit_on, "train_split": "train"}) == ["old", "new", "new"]
    # A subset that only another revision has is missing from this one.
    add_dataset(hub, "own/pinned@v2", {"other": {"train": mmlu_rows(9, "x")}})
    with pytest.raises(UserError, match="it has the subsets other; set data.subset to one"):
        words(revision="v2")


def test_parts_of_splits_are_split_too(hub):
    data = TaskDataModule("mmlu", val_split="test[:8]", test_split="test[8:]+dev")
    data.setup("fit")
    assert {split: len(some) for split, some in data.examples.items()} == {"train": 120, "validation": 8, "test": 62}


def test_doctor_says_what_a_fit_would_do(here, capsys):
    args = ["doctor", "--config", "gsm8k.yaml", "--config", "pythia_70m.yaml", "--data.task_args.max_new_tokens=6"]
    assert main([*args, *LIMITS, "--data.chat_template=false"]) == 0
    shown = capsys.readouterr().out
    for fact in (
        "⟦<bos>⟧Q: Which", "Give the final number after ####.", "1 time(s), <bos>", "on the left", "final number",
        "decoding step 0", "generated token 1", "float32 on cpu", "blocks.1.hook_resid", "running sums", "fits",
        "pooled activations", "5 variants of them at once",
        "A fit would start.",
    ):  # fmt: skip
        assert fact in shown, fact
    # However long the first sample's own answer is, the last prompt position is steered and the prefill is not.
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.count("│") == 5}
    assert rows["decoding step 0"].split("│")[4].strip() == "yes"
    assert "none" in rows["prefill"]
    assert not Path("checkpoints").exists()


def test_doctor_fails_where_a_fit_would(here, capsys):
    assert main(["doctor", "--config", "mmlu.yaml", "--model.layers", "[7]"]) == 2
    assert "layer 7 is not in google/gemma-2-2b-it" in capsys.readouterr().err
