"""The embedded world: what ships is what the code writes, and it shows what it is meant to show."""

import pytest

from corrsteer_pl import demo
from corrsteer_pl.demo import build, results
from corrsteer_pl.demo.corpus import World, qa_prompt, request_prompt
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import read_rows
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae_loading import load_saes
from corrsteer_pl.models.sae_training.train import Recipe, train_saes
from corrsteer_pl.tasks import make_task

PROMPTS = {"demo_qa": qa_prompt, "demo_refusal": request_prompt}


@pytest.fixture(scope="module")
def world():
    return World(seed=0)


def test_the_assets_are_small():
    assert sum(file.stat().st_size for file in demo.ROOT.rglob("*") if file.is_file()) <= 12_000_000


@pytest.mark.parametrize("task", PROMPTS)
def test_shipped_rows_are_those_that_the_code_writes(world, task):
    for split, rows in world.splits[task].items():
        assert read_rows(demo.DATA / task / f"{split}.jsonl") == rows


@pytest.mark.parametrize("task", PROMPTS)
def test_prompts_are_those_of_the_task(world, task):
    for row in world.splits[task]["test"][:50]:
        assert make_task(task, {}).example(row, row["id"]).prompt == PROMPTS[task](row)


def test_no_prompt_is_in_two_splits_or_in_training(world):
    held_out = [PROMPTS[task](row) for task, splits in world.splits.items() for rows in splits.values() for row in rows]
    assert len(held_out) == len(set(held_out)) == 2 * 4000
    assert [len(world.splits["demo_qa"][s]) for s in ("train", "validation", "test")] == [2400, 400, 1200]
    taught = {prompt for prompt, _ in world.training_texts(30_000, seed=9)}
    assert len(taught) > 5000
    assert not taught & set(held_out)


def test_worlds_of_one_seed_are_equal(world):
    assert list(World(0).training_texts(20, 5)) == list(world.training_texts(20, 5))
    assert list(World(1).training_texts(20, 5)) != list(world.training_texts(20, 5))


def test_the_model_loads_as_any_other():
    llm = LanguageModel.load(str(demo.MODEL))
    assert sum(parameter.numel() for parameter in llm.model.parameters()) < 3_000_000
    assert len(load_saes(str(demo.SAES), llm)) == llm.config.num_hidden_layers
    assert len(llm.single_tokens([" A", " B", " C", " D"])) == 4


@pytest.mark.slow
def test_a_build_writes_what_can_be_loaded(tmp_path, monkeypatch):
    for name, value in {"STEPS": 2, "SAE_STEPS": 3, "SAE_TEXTS": 200, "TOKENIZER_TEXTS": 2000}.items():
        monkeypatch.setattr(build, name, value)
    build.build(tmp_path / "assets")
    assert [path.name for path in tmp_path.iterdir()] == ["assets"], "the scratch folder is gone"
    llm = LanguageModel.load(str(tmp_path / "assets/model"))
    assert set(load_saes(str(tmp_path / "assets/saes"), llm)) == {0, 1, 2, 3}


def test_saes_of_no_text_or_no_layer_are_refused(llm, tmp_path):
    with pytest.raises(UserError, match="there are 0 texts"):
        train_saes(llm, [], tmp_path)
    with pytest.raises(UserError, match=r"layer 7 is not in the model \(layers 0..3\)"):
        train_saes(llm, ["a"], tmp_path, Recipe(layers=(7,)))


@pytest.mark.slow
@pytest.mark.parametrize("task", results.TASKS)
def test_the_pruned_selection_beats_unsteered_random_and_shuffled(task):
    result = results.run(task, seed=0)
    m = result.metrics
    assert 0.35 < m["reward_baseline"] < 0.80
    assert m["difference"] >= 0.05
    assert m["p_value"] < 0.01
    assert m["worse"] > 0, "a world without side effects would be too easy"
    assert m["reward_steered"] > max(result.random) + 0.02
    assert m["reward_steered"] > result.shuffled + 0.02
