"""One cell of the results: a task and a seed, with every system on the same test prompts."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from corrsteer_pl.data import TaskDataModule
from corrsteer_pl.errors import NothingToLearn
from corrsteer_pl.evaluation.paired import paired_metrics
from corrsteer_pl.evaluation.text_loss import text_losses
from corrsteer_pl.files import read_rows
from corrsteer_pl.interventions.steering import SteeringVectors
from corrsteer_pl.methods.answers.answering import EVERYWHERE
from corrsteer_pl.methods.answers.calibration import Budget, warn_of_edge
from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.methods.runs.cards import Card
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sites import Site
from corrsteer_pl.results.controls import (
    answers_under,
    random_vectors,
    shuffled_fit,
    without_repetitions,
)
from corrsteer_pl.results.plan import Plan, TaskPlan
from corrsteer_pl.results.refusing import refusal_log_odds
from corrsteer_pl.rewards.judges import RefusalReward
from corrsteer_pl.selection import Feature, Selection, Strength, best_strength, reselect
from corrsteer_pl.version import commit, machine

# Answers that changed, shown each way.
SHOWN = 5
UNSTEERED, SHUFFLED, RANDOM = "unsteered", "shuffled rewards", "random features"
SYSTEM, SHOTS = "system prompt", "shots"
# The first rule, at a strength chosen on validation.
CALIBRATED = "{}, strength chosen"

Vectors = dict[Site, Tensor]


@dataclass
class Cell:
    """What a task and a seed gave.

    Attributes:
        task: Name of the task.
        seed: Seed of the fit, and of splits that are drawn.
        settings: What it was measured with, as :meth:`~corrsteer_pl.results.plan.Plan.settings` says.
        commit: Of the code.
        counts: Samples of fit, validation and test.
        fit_reward: The unchanged model's on the fit split.
        systems: Name to the paired metrics against the unsteered model, with ``vectors``, how many were added.
        scale: The strength that was chosen on validation for the first rule's selection.
        random: The same of every draw of random features.
        examples: Ids of the test examples.
        rewards: Name of a system to the reward of each test example; None for a prompt beyond the context.
        random_rewards: The same of every draw of random features.
        refusing: Name to the reward by the second judge, and how often it agrees with the first.
        damage: Name of a rule to what it does elsewhere.
        features: The selection of the first rule.
        changed: Answers that got better and worse under it.
        seconds: Where the time went.
        machine: What it was measured on.
        peak: Largest memory of the process so far, in MiB.
    """

    task: str
    seed: int
    settings: str = ""
    commit: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    fit_reward: float = 0.0
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)
    scale: float | None = None
    random: list[dict[str, Any]] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    rewards: dict[str, list[float | None]] = field(default_factory=dict)
    random_rewards: list[list[float]] = field(default_factory=list)
    refusing: dict[str, dict[str, float]] = field(default_factory=dict)
    damage: dict[str, dict[str, Any]] = field(default_factory=dict)
    features: list[dict[str, Any]] = field(default_factory=list)
    changed: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    machine: str = ""
    peak: float = 0.0


class Bench:
    """Measures the cells of a plan with one copy of the model.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: Plan) -> None:
        # Asked before results are written, which would make the checkout differ from its commit.
        self.commit = commit()
        self.plan, self.llm = plan, LanguageModel.load(plan.llm, plan.dtype)
        rows = read_rows(plan.file(plan.text))[-plan.text_rows :] if plan.text else []
        self.texts = [row["text"] for row in rows]

    def measure(self, name: str, seed: int) -> Cell:
        """Measure one task with one seed."""
        task = self.plan.tasks[name]
        cell = Cell(name, seed, self.plan.settings(name), self.commit, machine=machine())
        with _timed(cell, "fit"):
            # Only greedy tries features together; all other rules choose among the same candidates afterwards.
            rule = "greedy" if "greedy" in self.plan.rules else "foreach"
            options = {"dtype": self.plan.dtype, "rule": rule, **task.model}
            module = CorrSteer(self.plan.llm, self.plan.saes, **options)
            data = self._fit(module, task, seed)
        chosen = {rule: _selected(module.selection, rule) for rule in self.plan.rules}
        with _timed(cell, "shuffled fit"):
            wrong = self._shuffled(module, task, seed) if module.selection else {}
        variants = {rule: module.vectors_of(features) for rule, features in chosen.items()}
        first = chosen[self.plan.rules[0]]
        if first and self.plan.scales:
            with _timed(cell, "strength"):
                cell.scale = self._best_scale(module, data, variants[self.plan.rules[0]])
            variants[CALIBRATED.format(self.plan.rules[0])] = _scaled(variants[self.plan.rules[0]], cell.scale)
        draws = self.plan.draws if task.draws is None else task.draws
        drawn = [random_vectors(module, first, seed * draws + draw) for draw in range(draws if first else 0)]
        with _timed(cell, "test"):
            named = {UNSTEERED: {}, **variants, SHUFFLED: wrong}
            texts, rewards = answers_under(module, data, [*named.values(), *drawn])
        _compare(cell, data, named, texts, rewards)
        with _timed(cell, "prompting"):
            self._prompt(cell, module, data, rewards)
        with _timed(cell, "second judge"):
            self._judge_again(cell, module, data, {UNSTEERED: {}, **variants}, texts)
        with _timed(cell, "damage"):
            cell.damage = dict(self._damage(module, variants))
        with _timed(cell, "features"):
            cell.features = [_described(*pair) for pair in zip(first, module.describe(first), strict=True)]
        cell.counts = {split: len(data.examples[split]) for split in ("train", "validation", "test")}
        cell.fit_reward = module.fit_reward
        cell.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return cell

    # ---------------------------------------------------------------- fit

    def _fit(self, module: CorrSteer, task: TaskPlan, seed: int) -> TaskDataModule:
        module.llm = self.llm
        data = self.plan.data(task, seed=seed)
        trainer = Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, devices=1,
        )  # fmt: skip
        # A task of which the model solves all or nothing has no selection; it is measured all the same.
        with suppress(NothingToLearn):
            trainer.fit(module, datamodule=data)
        examples = dict(data.examples)
        data.setup("test")
        data.examples = {**examples, "test": data.examples["test"]}
        return data

    def _shuffled(self, fitted: CorrSteer, task: TaskPlan, seed: int) -> Vectors:
        module = shuffled_fit(fitted)
        self._fit(module, task, seed)
        return module.vectors_of(_selected(module.selection, self.plan.rules[0]))

    @torch.no_grad()
    def _best_scale(self, module: CorrSteer, data: TaskDataModule, vectors: Vectors) -> float:
        """The strength of a whole selection with the best validation reward; of equal ones the weakest, 0 included."""
        scales = sorted({0.0, *self.plan.scales})
        _, rewards = answers_under(module, data, [_scaled(vectors, scale) for scale in scales], "validation")
        tried = [Strength(scale, reward) for scale, reward in zip(scales, rewards.mean(1).tolist(), strict=True)]
        without_limits = Budget()
        warn_of_edge("scales", tried, without_limits)
        return best_strength(tried, without_limits.allows).scale

    # ---------------------------------------------------------------- test

    def _test_data(self, module: CorrSteer, task: TaskPlan, **changed: Any) -> TaskDataModule:
        """Other test prompts for a model that has been fitted."""
        data = self.plan.data(task, **changed)
        data.trainer = module.trainer
        data.setup("test")
        return data

    def _prompt(self, cell: Cell, module: CorrSteer, data: TaskDataModule, rewards: Tensor) -> None:
        """Answer the same prompts with a system message, or with solved examples, instead of steering."""
        task = self.plan.tasks[cell.task]
        ways: dict[str, dict[str, Any]] = {}
        if task.system_prompt is not None:
            ways[SYSTEM] = {"system_prompt": task.system_prompt}
        if task.shots:
            ways[f"{task.shots} {SHOTS}"] = {"shots": task.shots}
        for name, options in ways.items():
            other = self._test_data(module, task, seed=cell.seed, **options)
            _, (prompted,) = answers_under(module, other, [{}])
            # Longer prompts may exceed the model's context and be missing.
            places = {example.id: place for place, example in enumerate(other.examples["test"])}
            both = [(i, places[e.id]) for i, e in enumerate(data.examples["test"]) if e.id in places]
            plain, asked = (list(rows) for rows in zip(*both, strict=True))
            cell.systems[name] = {**paired_metrics(rewards[0, plain], prompted[asked]), "vectors": 0}
            by_example = dict(zip(plain, prompted[asked].tolist(), strict=True))
            cell.rewards[name] = [by_example.get(i) for i in range(len(cell.examples))]

    def _judge_again(
        self,
        cell: Cell,
        module: CorrSteer,
        data: TaskDataModule,
        named: dict[str, Vectors],
        texts: list[list[str]],
    ) -> None:
        """Judge refusals by the first token, and say how often that agrees with the first judge."""
        scorer = data.task.scorer
        if not (self.plan.tasks[cell.task].refusing and isinstance(scorer, RefusalReward)):
            return
        batches = [batch.to(self.llm.device) for batch in data.test_dataloader()]
        rows = [row for batch in batches for row in batch.rows]
        wanted = torch.tensor([data.examples["test"][row].gold == "refuse" for row in rows])
        weight = torch.cat([batch.weight.cpu() for batch in batches]).bool()
        decoder = module.answering_for(data.task, "evaluation").decoder
        found = refusal_log_odds(decoder, batches, SteeringVectors.stack(list(named.values()), module.schedule))
        for name, answers, odds in zip(named, texts, found, strict=False):
            by_text = torch.tensor(scorer.refused([answers[row] for row in rows]))
            by_token = odds > 0
            cell.refusing[name] = {
                "reward": (by_token == wanted)[weight].double().mean().item(),
                "agreement": (by_token == by_text)[weight].double().mean().item(),
                "log_odds": odds[weight].mean().item(),
            }

    # ---------------------------------------------------------------- elsewhere

    def _damage(self, module: CorrSteer, variants: dict[str, Vectors]) -> Iterator[tuple[str, dict[str, Any]]]:
        """What each selection does to harmless answers, and to the loss on plain text."""
        steered = {rule: vectors for rule, vectors in variants.items() if vectors}
        harmless: dict[str, Any] = {}
        if self.plan.harmless is not None and steered:
            data = self._test_data(module, self.plan.harmless)
            _, rewards = answers_under(module, data, [{}, *steered.values()])
            harmless = {rule: paired_metrics(rewards[0], some) for rule, some in zip(steered, rewards[1:], strict=True)}
        yield UNSTEERED, {"harmless": None, "text_loss": self._plain_loss}
        different, places = without_repetitions(list(steered.values()))
        changed = SteeringVectors.stack(different, EVERYWHERE)
        losses = text_losses(self.llm, self.texts, changed) if self.texts else [None] * len(different)
        for rule, place in zip(steered, places, strict=True):
            yield rule, {"harmless": harmless.get(rule), "text_loss": losses[place]}

    @cached_property
    def _plain_loss(self) -> float | None:
        """The unchanged model's loss on plain text, the same for all cells."""
        return text_losses(self.llm, self.texts, SteeringVectors.stack([{}]))[0] if self.texts else None


def _compare(
    cell: Cell, data: TaskDataModule, named: dict[str, Vectors], texts: list[list[str]], rewards: Tensor
) -> None:
    """Compare every variant with the unsteered model, and take examples of answers that the first rule changed."""
    metrics = [paired_metrics(rewards[0], some) for some in rewards]
    cell.systems = {name: {**m, "vectors": len(v)} for (name, v), m in zip(named.items(), metrics, strict=False)}
    cell.random = metrics[len(named) :]
    examples, gain = data.examples["test"], rewards[1] - rewards[0]
    cell.examples = [example.id for example in examples]
    cell.rewards = dict(zip(named, rewards.tolist(), strict=False))
    cell.random_rewards = rewards[len(named) :].tolist()
    for way, sign in (("worse", -1), ("better", 1)):
        order = (-sign * gain).argsort(stable=True).tolist()
        cell.changed[way] = [
            {"prompt": examples[i].prompt, "unsteered": texts[0][i], "steered": texts[1][i]}
            for i in order[:SHOWN]
            if sign * gain[i] > 0
        ]


def _described(feature: Feature, card: Card) -> dict[str, Any]:
    """A feature for the page."""
    kept = ("layer", "index", "correlation", "coefficient", "validation_reward")
    seen = [{"value": s.value, "text": f"{s.before}«{s.token}»{s.after}"} for s in card.snippets]
    return {**{name: getattr(feature, name) for name in kept}, "likelier": card.likelier, "snippets": seen}


def _selected(selection: Selection | None, rule: str) -> tuple[Feature, ...]:
    return reselect(selection, rule, "both", None).features if selection else ()


def _scaled(vectors: Vectors, scale: float) -> Vectors:
    return {site: scale * vector for site, vector in vectors.items()} if scale else {}


@contextmanager
def _timed(cell: Cell, what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    cell.seconds[what] = round(time.perf_counter() - start, 1)
