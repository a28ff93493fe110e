import json
from types import SimpleNamespace

import pytest
import torch

from corrsteer_pl.cli.program import main
from corrsteer_pl.demo.corpus import World
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.models.sae_loading import load_saes
from corrsteer_pl.models.sae_training.activations import Activations, batches, is_text
from corrsteer_pl.models.sae_training.quality import qualities
from corrsteer_pl.models.sae_training.texts import answered_rows, answers, held_out, padded, token_rows
from corrsteer_pl.models.sae_training.train import UNFINISHED, Recipe, _trainer_cfg, train_saes
from corrsteer_pl.models.sites import Site
from tests.conftest import run_here

RECIPE = Recipe(layers=(1, 3), d_sae=64, k=4, steps=40, batch_tokens=64)
SITES = {layer: Site(layer, "resid_post") for layer in (1, 3)}


@pytest.fixture(scope="module")
def texts():
    return [prompt + answer for prompt, answer in World(0).training_texts(200, 5)]


def weights(folder):
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("*/sae_weights.safetensors"))}


def test_an_interrupted_training_ends_with_the_same_saes(llm, texts, tmp_path):
    train_saes(llm, texts, tmp_path / "whole", RECIPE)

    def stop(steps, rate):
        if steps > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_saes(llm, texts, tmp_path / "parts", RECIPE, save_every=1, report=stop)
    assert (tmp_path / "parts" / UNFINISHED).exists()
    steps = []
    train_saes(llm, texts, tmp_path / "parts", RECIPE, save_every=1, report=lambda done, rate: steps.append(done))
    assert steps[0] > 20, "it went on and did not begin anew"
    assert not (tmp_path / "parts" / UNFINISHED).exists()
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert set(load_saes(str(tmp_path / "whole"), llm)) == {1, 3}


def test_what_is_read_once_is_learnt_from_as_often_as_wanted(llm, texts):
    rows = token_rows(llm, texts[:40], 20)
    once, often = (Activations(llm, SITES, rows, 8, seed=3, reuse=reuse) for reuse in (1, 3))
    read = {tuple(x.tolist()) for batch in once.round() for x in batch[1]}
    dealt = [[tuple(x.tolist()) for x in batch[1]] for batch in often.round()]
    third = len(dealt) // 3
    for part in (dealt[:third], dealt[third : 2 * third], dealt[2 * third :]):
        # A last batch that is not full is left out, of each dealing another one.
        assert len({x for batch in part for x in batch} & read) >= len(read) - 16
    assert dealt[0] != dealt[third]
    assert once.state()["next"] == often.state()["next"], "no more texts are read"


@pytest.mark.parametrize("changed", [{"reuse": 0}, {"batch_tokens": 0}])
def test_a_recipe_without_tokens_is_refused(changed):
    with pytest.raises(UserError, match=f"{next(iter(changed))} is 0; it is a number from 1 on"):
        Recipe(**changed)


def test_large_saes_use_bfloat16_where_the_processor_has_it(monkeypatch):
    for amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        assert _trainer_cfg(Recipe(d_sae=2048), "cpu").autocast == amx
        assert _trainer_cfg(Recipe(d_sae=2048), "cuda").autocast
        assert not _trainer_cfg(Recipe(d_sae=512), "cuda").autocast


def test_an_unfinished_training_of_another_kind_is_left_alone(llm, texts, tmp_path):
    def stop(steps, rate):
        if steps > 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_saes(llm, texts, tmp_path, RECIPE, save_every=1, report=stop)
    for changed, said in (
        ({"recipe": Recipe(layers=(1, 3), d_sae=64, k=5, steps=40, batch_tokens=64)}, "with k 4, not 5"),
        ({"texts": texts[1:]}, "unfinished training with texts"),
    ):
        given = {"texts": texts, "recipe": RECIPE, **changed}
        with pytest.raises(UserError, match=said):
            train_saes(llm, out=tmp_path, save_every=1, **given)
    assert (tmp_path / UNFINISHED).exists()


def test_too_few_texts_or_tokens_are_refused(llm, tmp_path):
    with pytest.raises(UserError, match=r"have 4 tokens, fewer than one step needs \(2048\)"):
        train_saes(llm, [[5, 6, 7, 8]] * 2, tmp_path)
    with pytest.raises(UserError, match="there are 1 texts"):
        train_saes(llm, ["alone"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_stream_is_what_a_plain_pass_over_each_text_gives(llm, texts):
    rows = token_rows(llm, texts[:40], 20)
    stream = Activations(llm, SITES, rows, 8, seed=3)
    found = {layer: torch.cat([batch[layer] for batch in stream.round()]) for layer in SITES}
    expected = {layer: [] for layer in SITES}
    for row in rows:
        states = llm.model(torch.tensor([row]), output_hidden_states=True).hidden_states
        for layer in SITES:
            # A residual of the last block is normalised in hidden_states; the first token of a text is BOS here.
            expected[layer] += list(states[layer + 1][0, 1:]) if layer == 1 else []
    pool = torch.stack(expected[1])
    distances = torch.cdist(found[1], pool, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values
    assert distances.max() < 1e-3, "every residual of the stream is one of a text"
    assert len(found[1]) == len(found[3]) >= 8 * 15


def test_the_first_token_of_a_text_counts_no_more_than_bos_and_padding(llm):
    bos = llm.tokenizer.bos_token_id
    (batch,) = padded([[5, 6, bos, 7], [bos, 8]], 100, llm.device)
    assert is_text(llm, batch).tolist() == [[False, True, False, False], [False, True, False, True]]


def test_held_out_texts_are_none_of_those_learnt_from():
    rows = [[i] for i in range(100)]
    learnt, judged = held_out(rows, seed=1)
    assert sorted(learnt + judged) == rows
    assert len(judged) == 5
    assert held_out(rows, seed=1) == (learnt, judged) != held_out(rows, seed=2)


class Half:
    """Keeps what it is given, times a factor; of its three features the last never fires."""

    def __init__(self, factor, width):
        self.factor, self.device = factor, torch.device("cpu")
        self.cfg = SimpleNamespace(d_in=width, d_sae=3)

    def encode(self, x):
        self.x = x
        return torch.tensor([1.0, 2.0, 0.0]).expand(len(x), 3)

    def decode(self, features):
        return self.factor * self.x


def test_quality_is_what_plain_arithmetic_says(llm, texts):
    rows = token_rows(llm, texts[:6], 30)
    site, width = SITES[1], llm.config.hidden_size
    loss, found = qualities(
        llm, {0: (site, Half(1.0, width)), 1: (site, Half(0.0, width)), 2: (site, Half(0.5, width))}, rows
    )
    total = count = 0
    for row in rows:
        ids = torch.tensor([row])
        total += llm.model(ids, labels=ids).loss.item() * (len(row) - 1)
        count += len(row) - 1
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert (found[0].explained, found[0].recovered) == (pytest.approx(1), pytest.approx(1, abs=1e-5))
    assert found[0].loss == pytest.approx(loss, rel=1e-5)
    assert found[1].recovered == pytest.approx(0, abs=1e-6)
    assert (found[2].l0, found[2].dead) == (2, pytest.approx(1 / 3))
    residuals = []
    with torch.no_grad(), site.hook(llm.model, lambda x: residuals.append(x)):
        for row in rows:
            llm.model(torch.tensor([row]))
    x = torch.cat([r[0, 1:] for r in residuals]).double()
    expected = 1 - (0.25 * x.square().sum() / (x - x.mean(0)).square().sum()).item()
    assert found[2].explained == pytest.approx(expected, rel=1e-4)


def test_answers_are_those_of_generate_and_follow_the_prompt(llm, texts):
    prompts = [text[: len(text) // 2] for text in texts[:9]]
    found = answers(llm, prompts, 6)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = llm.token_ids(prompt)
        whole = llm.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
        assert answer == llm.tokenizer.decode(whole, skip_special_tokens=True)
    (row,) = answered_rows(llm, prompts[:1], found[:1], 100)
    assert llm.tokenizer.decode(row, skip_special_tokens=True) == prompts[0] + found[0]


def test_batches_hold_every_text_once_within_their_size(llm):
    rows = [[1] * n for n in (3, 1, 4, 1, 5, 9, 2, 6)]
    found = list(padded(rows, 12, llm.device))
    assert sorted(int(n) for batch in found for n in batch.attention_mask.sum(1)) == sorted(map(len, rows))
    assert all(batch.input_ids.numel() <= 12 for batch in found)
    assert len(list(batches(llm, rows))) == 1


@pytest.mark.slow
def test_the_command_keeps_answers_and_writes_what_came_of_it(tmp_path, capsys):
    world = list(World(0).training_texts(300, 5))
    write_jsonl(tmp_path / "texts.jsonl", [{"text": prompt + answer} for prompt, answer in world[:200]])
    write_jsonl(tmp_path / "asked.jsonl", [{"prompt": prompt} for prompt, _ in world[200:]])
    given = ["train_saes", "--llm=demo", "--out=saes", "--data=texts.jsonl", "--prompts=asked.jsonl", "--steps=2"]
    small = ["--layers=[1]", "--d_sae=32", "--k=4", "--answer_tokens=3"]
    run_here(*given, *small, cwd=tmp_path)
    assert "recovered" in capsys.readouterr().out
    about, *kept = map(json.loads, (tmp_path / "saes/answers.jsonl").read_text(encoding="utf-8").splitlines())
    assert about["answer_tokens"] == 3
    assert [row["prompt"] for row in kept] == [prompt for prompt, _ in world[200:]]
    found = json.loads((tmp_path / "saes/training.json").read_text(encoding="utf-8"))
    assert (found["texts"], found["prompts"], found["tokens"]) == (200, len(kept), 2 * 2048)
    assert set(found["layers"]) == {"1"}
    assert main(["train_saes", "--llm=demo", "--out=none"]) == 2
    assert "nothing to train SAEs on" in capsys.readouterr().err
