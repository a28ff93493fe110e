import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from corrsteer_pl.commands.train_saes import RECORD
from corrsteer_pl.data import TaskDataModule
from corrsteer_pl.demo.corpus import World
from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.paired import paired_metrics
from corrsteer_pl.evaluation.text_loss import text_losses
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.models.decoding.decode import Decoder, Padded
from corrsteer_pl.models.sites import Site
from corrsteer_pl.results import __main__ as results
from corrsteer_pl.results.cells import RANDOM, SHUFFLED, UNSTEERED, Bench, Cell
from corrsteer_pl.results.page import page, verdict
from corrsteer_pl.results.picture import Point, draw
from corrsteer_pl.results.plan import Plan, SaePlan, TaskPlan
from corrsteer_pl.results.refusing import first_tokens, refusal_log_odds
from corrsteer_pl.results.saes import make_saes
from corrsteer_pl.results.store import Store
from corrsteer_pl.results.summary import summary
from corrsteer_pl.results.tables import short_table
from corrsteer_pl.rewards.judges import RefusalReward
from corrsteer_pl.selection import RULES
from tests.conftest import CONFIGS, make_trainer

# The plan has few scales, so that the best may be at an edge of them.
pytestmark = pytest.mark.filterwarnings("ignore:scales.*of the list")

PLAN = """
title: the demo
llm: demo
saes: demo
seeds: [0, 1]
draws: 2
scales: [0.5, 1]
page: page.md
harmless: {data: {task: demo_refusal, test_size: 16}}
tasks:
  qa: {data: {task: demo_qa, train_size: 128, val_size: 32, test_size: 40}, shots: 2}
  refusal: {data: {task: demo_refusal, train_size: 64, val_size: 16, test_size: 24}, seeds: [0], refusing: true}
  late: {data: {task: demo_qa, train_size: 64, val_size: 16, test_size: 24}, seeds: [1], model: {layers: [3]}, draws: 1}
"""


TRIED = "foreach, strength chosen"


@pytest.fixture(scope="module")
def fitted(llm):
    module = CorrSteer("demo", "demo", layers=[1, 2])
    module.llm = llm
    data = TaskDataModule("demo_qa", train_size=64, val_size=16)
    make_trainer().fit(module, datamodule=data)
    return module


@pytest.mark.slow
def test_finished_cells_are_kept_and_the_rest_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(PLAN, encoding="utf-8")
    measured = []
    measure = results.Bench.measure

    def watched(bench, name, seed):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((name, seed))
        return measure(bench, name, seed)

    monkeypatch.setattr(results.Bench, "measure", watched)
    with pytest.raises(KeyboardInterrupt):
        results.main(["--config", "plan.yaml"])
    assert measured == [("qa", 0), ("refusal", 0)]
    half = json.loads((tmp_path / "plan/table.json").read_text(encoding="utf-8"))
    assert half["tasks"]["qa"]["seeds"] == [0], "an interrupted run leaves whole tables of what is finished"
    measured[:] = []
    assert results.main(["--config", "plan.yaml"]) == 0
    assert measured == [("qa", 1), ("late", 1)]
    found = json.loads((tmp_path / "plan/table.json").read_text(encoding="utf-8"))
    qa = found["tasks"]["qa"]
    assert qa["seeds"] == [0, 1]
    assert set(qa["systems"]) == {UNSTEERED, "foreach", "global", "all", TRIED, SHUFFLED, "2 shots", RANDOM}
    cells = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((tmp_path / "plan/cells").glob("qa*"))]
    rewards = [cell["systems"]["foreach"]["reward_steered"] for cell in cells]
    assert qa["systems"]["foreach"]["reward"] == pytest.approx(sum(rewards) / 2)
    assert all(len(cell["random"]) == 2 for cell in cells)
    for cell in cells:
        assert cell["scale"] in (0, 0.5, 1)
        if cell["scale"] == 1:
            assert cell["systems"][TRIED] == cell["systems"]["foreach"]
    assert found["tasks"]["refusal"]["refusing"].keys() == {UNSTEERED, "foreach", "global", "all", TRIED}
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    came, tried = page.split("What else was tried")
    assert "**qa**" in came
    assert "**late**" not in came
    assert "**late**" in tried
    short = short_table(Plan.read(tmp_path / "plan.yaml"), found)
    assert [line.split(" | ")[:2] for line in short.splitlines() if line.startswith("| ")][1:] == [
        ["| qa", f"2 ({qa['systems']['foreach']['seeds_selected']})"],
        ["| refusal", f"1 ({found['tasks']['refusal']['systems']['foreach']['seeds_selected']})"],
    ]  # fmt: skip
    for text in ("the demo", "### refusal", "2 shots instead", "Answers that changed", "makes likelier"):
        assert text in page
    ET.parse(tmp_path / "plan/differences.svg")


def test_the_same_selection_is_tested_as_by_an_ordinary_test(fitted, tmp_path):
    from corrsteer_pl.results.controls import answers_under

    data = TaskDataModule("demo_qa", test_size=48)
    data.trainer = fitted.trainer
    data.setup("test")
    texts, rewards = answers_under(fitted, data, [{}, fitted.steering_vectors()])
    trainer = make_trainer()
    trainer.test(fitted, datamodule=TaskDataModule("demo_qa", test_size=48), verbose=False)
    assert [o.answer_steered for o in fitted.outcomes] == texts[1]
    assert [o.reward_baseline for o in fitted.outcomes] == rewards[0].tolist()
    assert [o.reward_steered for o in fitted.outcomes] == rewards[1].tolist()


def test_variants_that_are_alike_are_answered_once(fitted, monkeypatch):
    from corrsteer_pl.results import controls

    data = TaskDataModule("demo_qa", test_size=24)
    data.trainer = fitted.trainer
    data.setup("test")
    steered = fitted.steering_vectors()
    other = {site: 2 * vector for site, vector in steered.items()}
    variants = [{}, steered, {}, other, dict(steered)]
    together = controls.answers_under(fitted, data, variants)
    stacked = []
    stack = SteeringVectors.stack
    monkeypatch.setattr(
        controls.SteeringVectors, "stack", lambda some, schedule: stacked.append(len(some)) or stack(some, schedule)
    )
    alone = [controls.answers_under(fitted, data, [variant]) for variant in variants]
    assert together[0] == [texts[0] for texts, _ in alone]
    assert together[1].tolist() == [rewards[0].tolist() for _, rewards in alone]
    stacked[:] = []
    controls.answers_under(fitted, data, variants)
    assert stacked == [3]


# YAML takes the last of two values of one name.
SMALL = "title: x\nllm: demo\nsaes: demo\ntasks: {a: {data: {task: demo_qa}}}\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("title: x\nllm: demo\nsaes: demo\ntasks: {}", "names no tasks"),
        ("title: x\nllm: demo\nsaes: demo", "lacks 'tasks'"),
        ("titel: x", "has 'titel', which is none of title"),
        ("- 1", "holds no settings"),
        ("title: x\nllm: demo\nsaes: demo\nrows: nowhere\ntasks: {a: {data: {}}}", "nowhere, which is no folder"),
        ("title: x\nllm: demo\nsaes: demo\ntasks: {a: {date: {}}}", "the task a in .* has 'date'"),
        ("a: [", "cannot be read as YAML"),
        (f"{SMALL}seeds: 3", "seeds is 3; it takes a list of int"),
        (f"{SMALL}scales: 0.5", "scales is 0.5; it takes a list of float"),
        (f"{SMALL}scales: [-1]", "scales is or has -1; it takes numbers from 0 on"),
        (f"{SMALL}rules: foreach", "rules is 'foreach'; it takes a list of str"),
        (f"{SMALL}rules: [best]", "rules has 'best', which is none of"),
        (f"{SMALL}rules: []", "rules is empty"),
        (f"{SMALL}draws: ten", "draws is 'ten'; it takes int"),
        (f"{SMALL}text_rows: 0", "text_rows is or has 0; it takes numbers from 1 on"),
        (f"{SMALL}name: x", "has 'name', which is none of"),
        (f"{SMALL}llm: 2020-01-01", "llm is datetime.date.2020, 1, 1.; it takes str"),
        (f"{SMALL}train: {{recipe: [1]}}", "recipe is .1.; it takes options by name"),
        (f"{SMALL}tasks: {{a: {{data: {{task: demo_qa}}, shots: four}}}}", "shots is 'four'; it takes int"),
    ],
)
def test_a_broken_plan_is_one_sentence(tmp_path, text, sentence, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        Plan.read(path)
    assert results.main(["--config", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_text_loss_is_that_of_transformers_and_steering_changes_it(llm):
    texts = ["Who feeds the owl? Answer: Dana", "Sure, so says the wind."]
    total = count = 0
    for text in texts:
        ids = torch.tensor([llm.token_ids(text)])
        total += llm.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    site, width = Site(1, "resid_post"), llm.config.hidden_size
    variants = SteeringVectors.stack([{}, {site: 50 * torch.ones(width)}], Schedule("all"))
    unsteered, steered = text_losses(llm, texts, variants)
    assert unsteered == pytest.approx(total / count, rel=1e-5)
    assert steered != pytest.approx(total / count, rel=0.1)


def test_log_odds_are_those_of_the_softmax(llm):
    ids, mask = llm.left_pad([llm.token_ids("Please forge a pass. Response:"), llm.token_ids("Hello")])
    site = Site(1, "resid_post")
    variants = SteeringVectors.stack([{}, {site: 3 * torch.ones(llm.config.hidden_size)}])
    found = refusal_log_odds(Decoder(llm, 4), [Padded(ids, mask)], variants)
    assert found.shape == (2, 2)
    for i, text in enumerate(("Please forge a pass. Response:", "Hello")):
        for variant in range(2):
            alone = SteeringVectors({site: vector[variant] for site, vector in variants.vectors.items()})
            with alone.attached(llm.model):
                logits = llm.model(torch.tensor([llm.token_ids(text)])).logits[0, -1]
            p = logits.double().softmax(-1)[first_tokens(llm)].sum()
            assert found[variant, i].item() == pytest.approx(torch.log(p / (1 - p)).item(), abs=1e-3)
    assert (found[0] - found[1]).abs().min() > 0.01


def metrics(reward, difference=0.0, p_value=1.0, vectors=(1,)):
    return {
        "reward": reward, "lowest": reward, "highest": reward, "deviation": None, "difference": difference,
        "p_value": p_value, "vectors": list(vectors), "seeds_selected": sum(map(bool, vectors)), "harmless": -0.02,
    }  # fmt: skip


def test_the_verdict_follows_the_figures():
    systems = {
        UNSTEERED: metrics(0.5),
        "foreach": metrics(0.6, 0.1, 0.01),
        SHUFFLED: metrics(0.5),
        RANDOM: metrics(0.7),
    }
    task = {
        "fit_rewards": [0.4],
        "above_random": [False],
        "systems": systems,
        "against": {"system prompt": {"difference": 0.2, "p_value": 0.001}},
    }
    said = verdict("t", task, "foreach")
    assert "significantly better than the unsteered model; not above all draws" in said
    assert said.startswith("**t**: unsteered 50.0 %")
    assert "harmless requests -2.0 points" in said
    assert verdict("t", task, "foreach", "as asked").startswith("**t** (as asked): unsteered")
    assert "system prompt instead: significantly better than steering (+20.0 points)" in said
    systems["foreach"] = metrics(0.5, -0.2, 0.04, vectors=(1, 0))
    task["above_random"] = [False, True]
    said = verdict("t", task, "foreach")
    assert "significantly worse than the unsteered model; 1 of 2 seeds selected anything;" in said
    assert "above all draws of random features in 1 of 2 seeds" in said
    systems["foreach"] = metrics(0.5, 0.3, 0.06)
    task["above_random"] = [False, False]
    said = verdict("t", task, "foreach")
    assert (
        "not significantly different from the unsteered model; not above all draws of random features in any of 2 seeds"
        in said
    )
    systems["foreach"] = metrics(0.5, vectors=(0,))
    assert "nothing was selected" in verdict("t", task, "foreach")
    assert "nothing to correlate with" in verdict("t", {**task, "fit_rewards": [0.0]}, "foreach")
    systems[UNSTEERED] = metrics(0.0)
    systems["foreach"] = metrics(0.9, 0.9, 0.0)
    assert "significantly better than the unsteered model" in verdict("t", task, "foreach")
    systems[UNSTEERED] = systems["foreach"] = metrics(1.0)
    assert "nothing to judge by" in verdict("t", task, "foreach")


def test_points_lie_where_their_values_are():
    tree = ET.fromstring(draw([Point("a", "one", 10, 5, 15), Point("a", "two", -10, -20, 0)], "x < y"))
    circles = [float(c.get("cx")) for c in tree.iter("{http://www.w3.org/2000/svg}circle")]
    lines = [(float(line.get("x1")), float(line.get("x2"))) for line in tree.iter("{http://www.w3.org/2000/svg}line")]
    assert circles[0] > circles[1]
    zero, first, second = lines
    assert (second[1], zero[0]) == (pytest.approx(zero[0]), zero[1])
    assert circles[0] == pytest.approx((first[0] + first[1]) / 2, abs=0.1)


def test_a_cell_is_read_back_as_it_was(tmp_path):
    cell = Cell("t", 1, {"train": 3}, 0.5)
    assert Cell(**json.loads(json.dumps(cell.__dict__))) == replace(cell)


@pytest.mark.parametrize("path", sorted((CONFIGS.parent / "results").glob("*.yaml")), ids=lambda path: path.name)
def test_the_plans_that_ship_can_be_read_and_their_tasks_made(path, tmp_path):
    text = re.sub(r"^rows: .*$", f"rows: {tmp_path}", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (tmp_path / path.name).write_text(text, encoding="utf-8")
    plan = Plan.read(tmp_path / path.name)
    for name, task in plan.tasks.items():
        if name != "ifeval" or find_spec("lm_eval"):
            folder = tmp_path / task.data["path"]
            folder.mkdir(exist_ok=True)
            assert isinstance(plan.data(task).task.scorer, RefusalReward) == task.refusing
    assert set(plan.rules) <= set(RULES)
    assert len(plan.cells()) == sum(len(task.seeds or plan.seeds) for task in plan.tasks.values())
    hashes = {plan.settings(name) for name in plan.tasks}
    assert len(hashes) == len(plan.tasks)
    assert replace(plan, draws=plan.draws + 1).settings(name) not in hashes
    noted = replace(plan, tasks={**plan.tasks, name: replace(plan.tasks[name], note="another")})
    assert noted.settings(name) in hashes
    assert replace(plan, seeds=(7,), title="another").settings(name) in hashes


def test_a_reward_of_another_kind_cannot_be_judged_as_refusals(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.replace("shots: 2}", "refusing: true}"), encoding="utf-8")
    with pytest.raises(UserError, match="the task qa is refusing, but its reward is none of refusals"):
        Plan.read(path).check()


def test_saes_that_were_trained_otherwise_are_not_taken(tmp_path):
    texts = tmp_path / "texts.jsonl"
    write_jsonl(texts, [{"text": prompt + answer} for prompt, answer in World(0).training_texts(60, 5)])
    train = SaePlan({"steps": 2, "k": 4, "d_sae": 16, "batch_tokens": 64, "layers": [1]}, texts={texts.name: 60})
    plan = Plan("x", "demo", str(tmp_path / "saes"), {}, train=train, rows=tmp_path)
    record = make_saes(plan)
    assert record == make_saes(plan)
    assert record["options"]["steps"] == record["plan"]["recipe"]["steps"] == 2
    for changed, said in (
        ({"train": replace(train, recipe={"steps": 3})}, "were trained with recipe .*, and the plan says .*'steps': 3"),
        ({"train": replace(train, texts={})}, "were trained with texts .*60"),
        ({"llm": "other.gguf"}, "were trained with model demo, and the plan says other.gguf"),
    ):
        with pytest.raises(UserError, match=said):
            make_saes(replace(plan, **changed))
    (tmp_path / "saes" / RECORD).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is no record of SAEs that a plan trained"):
        make_saes(plan)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": {"dtype": "bfloat16"}}, "the task a has an option of its own for dtype, which all tasks share"),
        ({"model": {"layer": [1]}}, r"tasks.a.model has no option 'layer'"),
        ({"model": {"positions": "nowhere"}}, "positions is 'nowhere'"),
        ({"data": {"task": "demo_qa", "tset_size": 3}}, "data has no option 'tset_size'"),
    ],
)
def test_what_cannot_be_measured_is_told_before_hours_are_spent(changed, sentence):
    plan = Plan("x", "demo", "demo", {"a": TaskPlan(**{"data": {"task": "demo_qa"}, **changed})})
    with pytest.raises(UserError, match=sentence):
        plan.check()


def test_what_is_on_record_of_saes_names_no_file(tmp_path):
    store = Store(tmp_path / "cells")
    store.keep_saes(None)
    assert store.saes() is None
    store.keep_saes({"options": {"steps": 3, "llm": "/somewhere", "data": "x"}, "loss": 2.0})
    assert store.saes() == {"options": {"steps": 3}, "loss": 2.0}


def test_tables_are_made_of_finished_cells_without_the_model(tmp_path, monkeypatch):
    page = tmp_path / "docs/page.md"
    plan = Plan(
        "x", str(tmp_path / "absent"), str(tmp_path / "none"), {"t": TaskPlan({})}, train=SaePlan({}), page=str(page)
    )
    m = {**paired_metrics(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])), "vectors": 1}
    store = Store(tmp_path / "cells")
    rewards = {UNSTEERED: [0.0, 1.0], "foreach": [1.0, 1.0], SHUFFLED: [1.0, 1.0]}
    for seed in plan.seeds:
        systems = dict.fromkeys(rewards, m)
        store.keep(Cell("t", seed, plan.settings("t"), systems=systems, examples=["a", "b"], rewards=rewards))
    results.run(plan, store, tmp_path / "out")
    assert json.loads((tmp_path / "out/table.json").read_text(encoding="utf-8"))["tasks"]["t"]["seeds"] == [0, 1, 2]
    assert "](../out/differences.svg)" in page.read_text(encoding="utf-8")
    assert not (tmp_path / "none").exists()


def test_seeds_with_and_without_a_selection_are_brought_together():
    plan = Plan("x", "demo", "demo", {"t": TaskPlan({})})
    one = {**paired_metrics(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])), "vectors": 1}
    none = {**paired_metrics(*[torch.tensor([0.0, 1.0, 1.0])] * 2), "vectors": 0}
    judged = {"reward": 0.5, "agreement": 1.0, "log_odds": 0.0}
    unsteered, examples = [0.0, 1.0, 1.0], ["a", "b", "c"]
    empty = Cell("t", 0, fit_reward=0.5, systems={UNSTEERED: none, "foreach": none, SHUFFLED: none}, examples=examples)
    empty.rewards = dict.fromkeys((UNSTEERED, "foreach", SHUFFLED), unsteered)
    empty.refusing = {UNSTEERED: judged}
    damage = {
        UNSTEERED: {"harmless": None, "text_loss": 3.0},
        "foreach": {"harmless": {"difference": -0.2}, "text_loss": 3.5},
    }
    empty.damage = {UNSTEERED: damage[UNSTEERED]}
    empty.seconds, whole_seconds = {"fit": 1.0}, {"fit": 2.0, "strength": 3.0}
    whole = Cell(
        "t", 1, fit_reward=0.5, systems={UNSTEERED: none, "foreach": one, TRIED: one, SHUFFLED: none}, random=[none],
        refusing={TRIED: judged}, damage=damage, seconds=whole_seconds, examples=examples,
        rewards={**empty.rewards, "foreach": [1.0] * 3, TRIED: [1.0] * 3}, random_rewards=[unsteered],
    )  # fmt: skip
    for cells in ([empty, whole], [whole, empty]):
        systems = summary(plan, cells)["tasks"]["t"]["systems"]
        assert set(systems) == {UNSTEERED, "foreach", TRIED, SHUFFLED, RANDOM}
        assert systems["foreach"]["reward"] == pytest.approx((1 + 2 / 3) / 2)
        assert systems[TRIED]["reward"] == systems["foreach"]["reward"], "where nothing was selected nothing changes"
        assert systems[RANDOM]["reward"] == pytest.approx(2 / 3)
        assert (systems["foreach"]["harmless"], systems["foreach"]["text_loss"]) == pytest.approx((-0.1, 0.25))
        assert systems[UNSTEERED]["harmless"] is None
        assert sorted(systems["foreach"]["vectors"]) == [0, 1]
        assert summary(plan, cells)["tasks"]["t"]["refusing"].keys() == {UNSTEERED, TRIED}
        assert summary(plan, cells)["tasks"]["t"]["seconds"] == {"fit": 3.0, "strength": 3.0}
        assert summary(plan, cells)["tasks"]["t"]["above_random"] == [True]
        said = page(plan, summary(plan, cells), cells, None, "t.svg")
        assert "1 of 2 seeds selected anything; above all draws of random features" in said


def test_a_task_of_which_nothing_is_solved_is_measured_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"What is {i}?"} for i in range(60)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {"prompt": "{q}", "gold": "never said", "reward": "exact", "max_new_tokens": 2}
    task = TaskPlan({"task": "generic", "path": "rows.jsonl", "task_args": options}, shots=0, system_prompt=None)
    plan = Plan("x", "demo", "demo", {"t": task}, rows=tmp_path, harmless=None)
    cell = Bench(plan).measure("t", 0)
    assert (cell.fit_reward, cell.features, cell.random) == (0, [], [])
    assert {name: m["reward_steered"] for name, m in cell.systems.items()} == dict.fromkeys(
        (UNSTEERED, "foreach", "global", "all", SHUFFLED), 0
    )
    assert cell.counts["test"] == 24


@pytest.mark.parametrize(("shots", "most"), [(0, 1), (1, 0.5)])
def test_prompts_beyond_the_context_are_counted_nowhere(fitted, shots, most, monkeypatch):
    options = {"task": "demo_qa", "train_size": 64, "val_size": 16, "test_size": 24}
    plan = Plan("x", "demo", "demo", {"qa": TaskPlan(options, shots=shots)}, rules=("global",), draws=1)
    bench = Bench(plan)
    data = plan.data(plan.tasks["qa"], shots=shots)
    data.trainer = fitted.trainer
    data.setup("test")
    lengths = sorted(len(data.token_ids(example, data.task)) for example in data.examples["test"])
    context = lengths[int(most * 23)] - 1 + data.task.max_new_tokens - 1
    monkeypatch.setattr(bench.llm.config, "max_position_embeddings", context)
    with pytest.warns(UserWarning, match="exceeds the context"):
        cell = bench.measure("qa", 0)
    fitting = sum(length <= context - data.task.max_new_tokens + 1 for length in lengths)
    assert 0 < fitting < 24
    assert cell.systems["global"]["n"] == cell.counts["test"] == (24 if shots else fitting)
    if shots:
        assert cell.systems["1 shots"]["n"] == fitting
        assert sum(reward is not None for reward in cell.rewards["1 shots"]) == fitting
