"""A language model and benchmark rows that nobody made for these tests; skipped where they are absent."""

import json

import pytest

from corrsteer_pl.files import read_rows, write_jsonl
from tests.conftest import SHARED, run_here

STORIES, TEXTS, MMLU = (SHARED / p for p in ("models/stories260K", "data/tinystories/train.jsonl", "data/mmlu"))
QUIET = "--trainer.enable_progress_bar=false"


@pytest.mark.slow
@pytest.mark.skipif(not (STORIES.exists() and TEXTS.exists()), reason="the TinyStories model or texts are absent")
def test_stories_are_steered_towards_direct_speech(tmp_path):
    run_here(
        "train_saes",
        "--llm",
        STORIES,
        "--data",
        TEXTS,
        "--out",
        "saes",
        "--d_sae=256",
        "--k=8",
        "--steps=60",
        cwd=tmp_path,
    )
    assert len(list((tmp_path / "saes").glob("blocks.*.hook_resid_post"))) == 5
    # Sentence beginnings instead of whole stories give the few hundred prompts that a correlation needs.
    starts = [text for row in read_rows(TEXTS) for text in row["text"].split("\n\n") if len(text.split()) > 12]
    write_jsonl(tmp_path / "starts.jsonl", [{"text": text} for text in dict.fromkeys(starts)])
    (tmp_path / "stories.yaml").write_text(
        f"model: {{llm: {STORIES}, saes: saes}}\n"
        "data: {task: generic, path: starts.jsonl, train_size: 300, val_size: 60, test_size: 100, task_args: "
        "{prompt: '{text}', first_words: 10, gold: '\"', reward: contains, max_new_tokens: 24}}\n"
        "trainer: {enable_progress_bar: false}\n",
        encoding="utf-8",
    )
    run_here("fit", "--config", "stories.yaml", cwd=tmp_path)
    run_here("test", "--ckpt_path", "checkpoints/stories/last.ckpt", cwd=tmp_path)
    selection = json.loads((tmp_path / "checkpoints/stories/selection.json").read_text(encoding="utf-8"))
    assert selection["samples"] == 300
    assert 0 < selection["reward"] < 1
    assert max(f["correlation"] for f in selection["candidates"]) > selection["null_max_correlation"]
    metrics = json.loads((tmp_path / "checkpoints/stories/test/generic/metrics.json").read_text(encoding="utf-8"))
    assert metrics["n"] == 100
    assert bool(selection["features"]) == (metrics["changed"] > 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* prompts are .* prompts too:UserWarning")  # real rows repeat themselves
@pytest.mark.skipif(not MMLU.exists(), reason="the MMLU rows are absent")
def test_real_mmlu_rows_run_through(tmp_path):
    sizes = ["--data.train_size=200", "--data.val_size=40", "--data.test_size=200"]
    run_here("fit", "--config", "mmlu_rows.yaml", f"--data.path={MMLU}", *sizes, QUIET, cwd=tmp_path)
    run_here("test", "--ckpt_path", "checkpoints/mmlu_rows/last.ckpt", QUIET, cwd=tmp_path)
    metrics = json.loads((tmp_path / "checkpoints/mmlu_rows/test/choice/metrics.json").read_text(encoding="utf-8"))
    assert metrics["n"] == 200
    # Chance is a quarter; four standard deviations of 200 guesses are 12 points.
    assert 0.13 < metrics["reward_baseline"] < 0.37, "the model knows a made-up village and nothing else"
