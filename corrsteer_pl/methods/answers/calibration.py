"""How strongly a selection steers: the best reward in validation that stays within a budget of damage."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from corrsteer_pl.data import Batch, TaskDataModule
from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.methods.answers.answering import Answering, answered
from corrsteer_pl.models.decoding.decode import Decoder, Intervention
from corrsteer_pl.options import check_options, import_paths
from corrsteer_pl.selection import Strength, best_strength, beyond_edge
from corrsteer_pl.strategy import all_reduce_sum

# Where a budget's prompts may come from, beside its limits.
DATA = ("task", "path", "revision", "subset", "task_args", "filter", "balance", "val_split", "chat_template")


@dataclass(frozen=True)
class Budget:
    """What a selection may cost.

    Attributes:
        kl: Largest mean KL divergence, in nats, of the steered from the unsteered model's first new token.
        loss: Largest fall of another task's mean reward.
        data: Options of the data module for the prompts of another task; empty for those of the validation.
        size: Largest number of these prompts.
    """

    kl: float | None = None
    loss: float | None = None
    data: Mapping[str, Any] | None = None
    size: int = 200

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> Self:
        """A budget of ``model.budget``; one without limits if there is none.

        Raises:
            UserError: An option is unknown, of another type, or out of range, or there is no limit.
        """
        if options is None:
            return cls()
        limits = {name: value for name, value in options.items() if name in ("kl", "loss", "size")}
        data = {name: value for name, value in options.items() if name not in limits}
        if unknown := sorted(set(data) - set(DATA)):
            raise UserError(
                f"model.budget has {unknown[0]!r}, which is none of {choices(['kl', 'loss', 'size', *DATA])}."
            )
        check_options(cls, limits, "model.budget")
        budget = cls(**limits, data=data)
        if budget.kl is None and budget.loss is None:
            raise UserError("model.budget has no limit. Give it kl, in nats, or loss, a difference of rewards.")
        for name, value in (("kl", budget.kl), ("loss", budget.loss)):
            if value is not None and value < 0:
                raise UserError(f"model.budget.{name} is {value}; it is a number from 0 on.")
        if budget.size < 1:
            raise UserError(f"model.budget.size is {budget.size}; it is a number of prompts, at least 1.")
        if data:
            prompts_of(data, "model.budget")
        if budget.loss is not None and not data:
            raise UserError("model.budget.loss is the fall of another task's reward. Name that task as budget.task.")
        return budget

    def allows(self, strength: Strength) -> bool:
        """Whether a strength stays within the limits."""
        pairs = ((strength.kl, self.kl), (strength.loss, self.loss))
        return all(limit is None or (found is not None and found <= limit) for found, limit in pairs)

    def used(self, strength: Strength) -> str:
        """How much of each limit a strength uses, as part of a sentence."""
        pairs = (("KL", strength.kl, self.kl), ("loss", strength.loss, self.loss))
        parts = [
            f"{name} {value:.2g} of at most {limit:g}" for name, value, limit in pairs if None not in (value, limit)
        ]
        return f"with {' and '.join(parts)}" if parts else "without a budget"

    def prompts(self, like: TaskDataModule) -> TaskDataModule:
        """Data of the prompts on which damage is measured, read and ready; ``like`` itself if no other is named."""
        if not self.data:
            return like
        shared = {name: like.hparams[name] for name in ("batch_size", "chat_template", "sort_by_length", "seed")}
        other = TaskDataModule(**{**shared, **self.data}, val_size=self.size)
        other.trainer = like.trainer
        other.setup("validate")
        return other


def warn_of_edge(
    option: str, curve: Sequence[Strength], budget: Budget, remedy: str = "", most: float = math.inf
) -> None:
    """Warn if the best of a given list of strengths is at an edge of the list, so that a better one may lie beyond.

    Args:
        option: Name of the option that holds the list.
        curve: What was measured, strength 0 included.
        budget: The limits.
        remedy: What else the user can do than to extend the list, as the end of a sentence.
        most: The largest strength that the option takes.
    """
    beyond = beyond_edge(curve, budget.allows, most)
    if beyond is None:
        return
    same_sign = [strength for strength in curve if strength.scale * beyond > 0]
    edge = min(same_sign, key=lambda strength: abs(strength.scale - beyond))
    end, missing = ("largest", "stronger") if abs(beyond) > abs(edge.scale) else ("smallest", "weaker")
    best = best_strength(curve, budget.allows)
    role = "is the best on validation" if best == edge else "leaves the unchanged model the best on validation"
    warnings.warn(
        f"{option}: {edge.scale:g}, the {end} of the list, {role}, {budget.used(edge)}; {missing} ones were not tried. "
        f"Add {beyond:g} to the list{remedy}.",
        stacklevel=2,
    )


def warn_of_open_end(option: str, curve: Sequence[Strength], budget: Budget) -> None:
    """Warn if a search ended with the best strength at an edge of what was measured.

    Args:
        option: Name of the option that takes a list instead.
        curve: What was measured, strength 0 included.
        budget: The limits.
    """
    best, beyond = best_strength(curve, budget.allows), beyond_edge(curve, budget.allows)
    if best.scale and beyond is not None:
        warnings.warn(
            f"{option}: the search ended at {best.scale:g}, {budget.used(best)}, and the best strength may lie beyond. "
            f"To go on, set {option} to a list.",
            stacklevel=2,
        )


def prompts_of(data: Mapping[str, Any], option: str) -> Mapping[str, Any]:
    """Options of the data module for prompts of another task, checked.

    Raises:
        UserError: One is unknown, there is no task, or code would be imported.
    """
    if unknown := sorted(set(data) - set(DATA)):
        raise UserError(f"{option} has {unknown[0]!r}, which is none of {choices(DATA)}.")
    if "task" not in data:
        raise UserError(f"{option} has {sorted(data)[0]}, but no task. Name the task of its prompts.")
    if paths := import_paths(data):
        # A checkpoint keeps these options, and must not have code imported that its user has not asked for.
        raise UserError(f"{option} names {next(iter(paths.values()))}; it takes tasks and rewards of this program.")
    return data


def damage(
    method: Any, budget: Budget, variants: Intervention, data: TaskDataModule | None = None
) -> dict[str, list[Any]]:
    """What each variant costs, by the limits of a budget; the first variant is the unchanged model.

    Every process must call it.

    Args:
        method: The method.
        budget: The limits.
        variants: What is measured.
        data: The budget's prompts, if they were read before.
    """
    if budget.kl is None and budget.loss is None:
        return {}
    data = data or budget.prompts(method.datamodule)
    if not data.task.generates:
        raise UserError(f"model.budget needs a task that is answered; {data.hparams['task']} has texts.")
    decoder = Decoder(method.llm, data.task.max_new_tokens, None, method.candidate_batch_size)
    found: dict[str, list[Any]] = {}
    if budget.kl is not None:
        found["kl"] = divergences(decoder, _moved(data, method.device), variants)
    if budget.loss is not None:
        data.task.load(str(method.device))
        found["loss"] = losses(answered(decoder, data.task, data), _moved(data, method.device), variants)
    return found


def _moved(data: TaskDataModule, device: torch.device) -> Iterator[Batch]:
    return (batch.to(device) for batch in data.val_dataloader())


@torch.no_grad()
def divergences(decoder: Decoder, batches: Iterable[Batch], variants: Intervention) -> list[float | None]:
    """Mean over prompts of KL(unchanged || variant) of the first new token, in nats, for each variant.

    None where it is not finite, because a variant that strong overflows; that is within no limit.
    """

    def of(batch: Batch) -> Tensor:
        log_p = decoder.first_logits(batch, variants).float().log_softmax(-1)  # (variants, B, vocabulary)
        return (log_p[0].exp() * (log_p[0] - log_p)).sum(-1)

    means = _means(of, batches, decoder.llm.device).tolist()
    return [kl if math.isfinite(kl) else None for kl in means]


@torch.no_grad()
def losses(answering: Answering, batches: Iterable[Batch], variants: Intervention) -> list[float]:
    """How far the mean reward of each variant is below the unchanged model's."""

    def of(batch: Batch) -> Tensor:
        return torch.stack([rewards for _, rewards in answering.compare(batch, variants)])

    means = _means(of, batches, answering.decoder.llm.device)
    return (means[0] - means).tolist()


def _means(of: Callable[[Batch], Tensor], batches: Iterable[Batch], device: torch.device) -> Tensor:
    """Means ``(variants,)`` float64 over the samples of all processes of what a batch gives, ``(variants, batch)``."""
    pairs = [(of(batch).cpu().double(), batch.weight.cpu().double()) for batch in batches]
    sums = torch.stack([torch.cat([values @ weight, weight.sum().unsqueeze(0)]) for values, weight in pairs]).sum(0)
    total = all_reduce_sum(sums.to(device) if device.type == "cuda" else sums).cpu()
    return total[:-1] / total[-1]
