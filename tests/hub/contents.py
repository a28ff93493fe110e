"""What the shipped configurations load, made small: data sets, models and autoencoders under their real names."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.hub.autoencoders import (
    add_gemma_scope,
    add_gemma_scope_2,
    add_llama_scope,
    add_qwen_scope,
    add_sae_lens,
)
from tests.hub.language_models import EOS, add_classifier, add_language_model
from tests.hub.server import Hub

# Among these every benchmark has a right answer now and then.
SAYS = (" A", " B", " C", " 1", EOS)
LAYERS = 2


def add_dataset(hub: Hub, name: str, configs: Mapping[str, Mapping[str, Sequence[dict]]]) -> Path:
    """Write one parquet file per configuration and split, and the README that names them."""
    folder = hub.dataset(name)
    described = []
    for config, splits in configs.items():
        data_files = []
        for split, rows in splits.items():
            path = f"{'data' if config == 'default' else config}/{split}-00000-of-00001.parquet"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            columns = dict.fromkeys(column for row in rows for column in row)
            table = pa.table({column: [row.get(column) for row in rows] for column in columns})
            pq.write_table(table, folder / path)
            data_files.append({"split": split, "path": path})
        described.append({"config_name": config, "data_files": data_files})
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump({'configs': described})}---\n\n# {name}\n", encoding="utf-8"
    )
    return folder


def fill(hub: Hub) -> Hub:
    """Put everything there."""
    add_models(hub)
    add_benchmarks(hub)
    return hub


def add_models(hub: Hub) -> None:
    """Language models, their autoencoders, and the classifiers of the rewards."""
    layers = range(LAYERS)
    model = {"layers": LAYERS, "says": SAYS}
    add_language_model(hub, "google/gemma-2-2b-it", "gemma2", width=2304, chat=True, **model)
    add_gemma_scope(
        hub, "google/gemma-scope-2b-pt-res",
        ["layer_0/width_16k/average_l0_105", "layer_1/width_16k/average_l0_102"], d_in=2304,
    )  # fmt: skip
    add_language_model(hub, "google/gemma-2-9b-it", "gemma2", width=3584, chat=True, **{**model, "layers": 1})
    add_gemma_scope(hub, "google/gemma-scope-9b-pt-res", ["layer_0/width_16k/average_l0_129"], d_in=3584)
    for size in ("270m", "1b", "4b", "12b", "27b"):
        add_language_model(hub, f"google/gemma-3-{size}-it", "gemma3", chat=True, seed=2, **model)
        folders = [f"resid_post_all/layer_{layer}_width_16k_l0_small" for layer in layers]
        add_gemma_scope_2(hub, f"google/gemma-scope-2-{size}-it", folders)
    add_language_model(hub, "meta-llama/Llama-3.1-8B", "llama", **model)
    add_llama_scope(hub, "fnlp/Llama3_1-8B-Base-LXR-8x", [f"Llama3_1-8B-Base-L{layer}R-8x" for layer in layers])
    add_language_model(hub, "Qwen/Qwen3-1.7B-Base", "qwen3", width=2048, chat=True, **{**model, "layers": 1})
    add_qwen_scope(hub, "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", [0])
    add_language_model(hub, "openai-community/gpt2", "gpt2", **model)
    add_sae_lens(
        hub, "jbloom/GPT2-Small-SAEs-Reformatted",
        {f"blocks.{layer}.hook_resid_pre": f"blocks.{layer}.hook_resid_pre" for layer in layers}, old=True,
    )  # fmt: skip
    add_language_model(hub, "EleutherAI/pythia-70m-deduped", "gpt_neox", **model)
    add_sae_lens(
        hub, "ctigges/pythia-70m-deduped__res-sm_processed",
        {f"{layer}-res-sm": f"blocks.{layer}.hook_resid_post" for layer in layers},
    )  # fmt: skip
    add_language_model(hub, "HuggingFaceTB/SmolLM2-135M-Instruct", "llama", chat=True, **model)
    add_classifier(hub, "ProtectAI/distilroberta-base-rejection-v1")
    add_classifier(hub, "dleemiller/ModernCE-base-sts", labels=("LABEL_0",))


def add_benchmarks(hub: Hub) -> None:
    """The benchmarks, in the columns, configurations and splits of the real ones."""
    add_dataset(
        hub, "cais/mmlu",
        {"all": {name: mmlu_rows(n, name) for name, n in
                 {"auxiliary_train": 120, "validation": 40, "test": 60, "dev": 10}.items()}},
    )  # fmt: skip
    add_dataset(
        hub,
        "TIGER-Lab/MMLU-Pro",
        {"default": {"test": mmlu_pro_rows(200, "test"), "validation": mmlu_pro_rows(10, "validation")}},
    )
    add_dataset(hub, "openai/gsm8k", {"main": {"train": gsm8k_rows(80, "train"), "test": gsm8k_rows(20, "test")}})
    add_dataset(hub, "Elfsong/BBQ", {"default": {name: bbq_rows(200, name) for name in ("age", "religion")}})
    sizes = {"standard": 200, "contextual": 100, "copyright": 100}
    add_dataset(hub, "walledai/HarmBench", {name: {"train": harmbench_rows(n, name)} for name, n in sizes.items()})
    hub.gated.add("walledai/HarmBench")
    add_dataset(hub, "walledai/XSTest", {"default": {"test": xstest_rows(450)}})
    add_dataset(hub, "google/IFEval", {"default": {"train": ifeval_rows(541)}})
    add_dataset(hub, "basicv8vc/SimpleQA", {"default": {"test": simpleqa_rows(300)}})
    add_dataset(
        hub, "allenai/ai2_arc",
        {"ARC-Challenge": {name: arc_rows(n, name) for name, n in {"train": 90, "validation": 30, "test": 40}.items()},
         "ARC-Easy": {"train": arc_rows(5, "easy")}},
    )  # fmt: skip
    add_dataset(
        hub,
        "truthfulqa/truthful_qa",
        {"multiple_choice": {"validation": truthfulqa_rows(150)}, "generation": {"validation": []}},
    )
    add_dataset(hub, "cais/wmdp", {f"wmdp-{part}": {"test": mmlu_rows(200, part)} for part in ("bio", "cyber")})
    add_dataset(
        hub,
        "cais/wmdp-corpora",
        {"bio-retain-corpus": {"train": corpus_rows(40, "water the tulips")},
         "cyber-forget-corpus": {"train": corpus_rows(40, "exploit the socket buffer")},
         "cyber-retain-corpus": {"train": corpus_rows(40, "prune the lavender hedge")}},
    )  # fmt: skip
    hazards = [{"title": "x", **row} for row in corpus_rows(40, "culture the virus")]
    add_dataset(hub, "cais/wmdp-bio-forget-corpus", {"default": {"train": hazards}})
    hub.gated.add("cais/wmdp-bio-forget-corpus")
    add_dataset(hub, "McGill-NLP/stereoset", {"intrasentence": {"validation": stereoset_rows(100)}})


def corpus_rows(n: int, about: str) -> list[dict]:
    """Texts about something."""
    rng = random.Random(about)
    return [{"text": " ".join([about, *rng.choices(about.split(), k=20), str(i)])} for i in range(n)]


WORDS = (
    "river", "stone", "market", "window", "garden", "bridge", "winter", "letter", "mirror", "basket", "candle",
    "forest", "island", "pepper",
)  # fmt: skip


def words(drawn: random.Random, count: int) -> str:
    """Some words."""
    return " ".join(drawn.choice(WORDS) for _ in range(count))


def questions(count: int, name: str) -> list[tuple[random.Random, str]]:
    """Different questions, each with a source of further chance."""
    drawn = random.Random(name)
    return [(drawn, f"Which {words(drawn, 4)} is meant in {name} {i}?") for i in range(count)]


def mmlu_rows(count: int, name: str) -> list[dict]:
    """Four options; the auxiliary rows have no subject."""
    return [
        {
            "question": question,
            "subject": "" if name == "auxiliary_train" else drawn.choice(["anatomy", "virology"]),
            "choices": [words(drawn, 2) for _ in range(4)],
            "answer": drawn.randrange(3),
        }
        for drawn, question in questions(count, name)
    ]


def mmlu_pro_rows(count: int, name: str) -> list[dict]:
    """Three to ten options."""
    return [
        {
            "question_id": i,
            "question": question,
            "options": [words(drawn, 2) for _ in range(drawn.randint(3, 10))],
            "answer": "ABC"[i % 3],
            "answer_index": i % 3,
            "cot_content": "",
            "category": drawn.choice(["law", "physics"]),
            "src": "made",
        }
        for i, (drawn, question) in enumerate(questions(count, name))
    ]


def gsm8k_rows(count: int, name: str) -> list[dict]:
    """Worked solutions whose number is 1 or 11."""
    return [
        {"question": question, "answer": f"That is <<1*1=1>>1.\n#### {drawn.choice([1, 11])}"}
        for drawn, question in questions(count, name)
    ]


def bbq_rows(count: int, name: str) -> list[dict]:
    """All conditions and polarities, in the columns of the Hub's copy."""
    return [
        {
            "category": name.capitalize(),
            "example_id": i,
            "question_index": i // 4,
            "question_polarity": ("neg", "nonneg")[i % 2],
            "context_condition": ("ambig", "disambig")[i // 2 % 2],
            "context": f"Somebody saw {words(drawn, 5)}.",
            "question": question,
            "ans0": "The first",
            "ans1": "The second",
            "ans2": "Not known",
            "answer_info": {"ans0": ["first", "old"], "ans1": ["second", "nonOld"], "ans2": ["Not known", "unknown"]},
            "answer_label": 2 if i // 2 % 2 == 0 else drawn.randrange(2),
            "target_label": drawn.randrange(2),
            "additional_metadata": {"subcategory": "None", "source": "made"},
        }
        for i, (drawn, question) in enumerate(questions(count, name))
    ]


def harmbench_rows(count: int, name: str) -> list[dict]:
    """Standard and contextual rows have categories, copyright rows tags."""
    rows = [(f"Do not {question}", words(drawn, 6)) for drawn, question in questions(count, name)]
    if name == "copyright":
        return [{"prompt": prompt, "tags": ["lyrics"]} for prompt, _ in rows]
    context = {"contextual": lambda text: {"context": text}}.get(name, lambda _: {})
    return [{"prompt": prompt, **context(text), "category": "illegal"} for prompt, text in rows]


def xstest_rows(count: int) -> list[dict]:
    """Safe and unsafe requests."""
    return [
        {
            "prompt": question,
            "focus": drawn.choice(WORDS),
            "type": "homonyms" if i % 9 < 5 else "contrast_homonyms",
            "note": "",
            "label": "safe" if i % 9 < 5 else "unsafe",
        }
        for i, (drawn, question) in enumerate(questions(count, "xstest"))
    ]


def ifeval_rows(count: int) -> list[dict]:
    """Every option of every instruction is a field, empty where the instruction has no such option."""
    none = {"relation": None, "num_words": None, "keywords": None}
    return [
        {
            "key": i,
            "prompt": question,
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"][: 1 + i % 2],
            "kwargs": [none, {**none, "relation": "at least", "num_words": 300}][: 1 + i % 2],
        }
        for i, (_, question) in enumerate(questions(count, "ifeval"))
    ]


def simpleqa_rows(count: int) -> list[dict]:
    """The metadata are the text of a Python dict, as in the Hub's copy."""
    return [
        {
            "metadata": str({"topic": drawn.choice(["Art", "Sports"]), "urls": []}),
            "problem": q,
            "answer": words(drawn, 2),
        }
        for drawn, q in questions(count, "simpleqa")
    ]


def arc_rows(count: int, name: str) -> list[dict]:
    """Labels are letters in most rows and digits in some."""
    return [
        {
            "id": f"{name}_{i}",
            "question": question,
            "choices": {"text": [words(drawn, 2) for _ in range(4)], "label": list("1234" if i % 9 == 0 else "ABCD")},
            "answerKey": ("123" if i % 9 == 0 else "ABC")[drawn.randrange(3)],
        }
        for i, (drawn, question) in enumerate(questions(count, name))
    ]


def truthfulqa_rows(count: int) -> list[dict]:
    """The right option comes first."""
    return [
        {
            "question": question,
            "mc1_targets": {"choices": [words(drawn, 3) for _ in range(n)], "labels": [1] + [0] * (n - 1)},
            "mc2_targets": {"choices": ["x"], "labels": [1]},
        }
        for drawn, question in questions(count, "truthfulqa")
        for n in [drawn.randint(2, 13)]
    ]


def stereoset_rows(count: int) -> list[dict]:
    """Three sentences each, with labels 0 (anti-stereotype), 1 (stereotype) and 2 (unrelated)."""
    return [
        {
            "id": f"stereoset_{i}",
            "target": drawn.choice(WORDS),
            "bias_type": drawn.choice(["gender", "race"]),
            "context": "BLANK",
            "sentences": {
                "sentence": [f"{words(drawn, 6)} {kind} {i}." for kind in range(3)],
                "id": [f"{i}_{kind}" for kind in range(3)],
                "labels": [{"label": [], "human_id": []}] * 3,
                "gold_label": drawn.sample(range(3), 3),
            },
        }
        for i, (drawn, _) in enumerate(questions(count, "stereoset"))
    ]
