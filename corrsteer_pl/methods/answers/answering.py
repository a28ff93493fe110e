"""How a task is answered: by generating text, by the likelihood of options, or by a probe of the label of a text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from corrsteer_pl.data import Batch, TaskDataModule
from corrsteer_pl.interventions.steering import Schedule
from corrsteer_pl.interventions.switched import Switched
from corrsteer_pl.models.decoding.decode import Decoder, Intervention
from corrsteer_pl.models.decoding.kept import KeptPrompts
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.sae import Encoder
from corrsteer_pl.stats import Probe
from corrsteer_pl.tasks import Task, rewards_of, users_own

# A text is read in one forward pass, so all of its positions are steered.
EVERYWHERE = Schedule("all")


class Answering(Protocol):
    """What a method asks of a task's batches.

    Attributes:
        decoder: What runs the model.
        schedule: The only way to steer here; None for whichever the user wants.
    """

    decoder: Decoder
    schedule: Schedule | None

    def observe(self, batch: Batch, reader: PoolReader | None = None) -> list[str]:
        """Answers of the unchanged model, while ``reader`` pools its activations."""

    def rewards(self, texts: list[str], batch: Batch) -> Tensor:
        """Rewards of one answer per sample, ``(batch,)`` float64 on the CPU."""

    def texts(self, batch: Batch, variants: Intervention, kept: KeptPrompts | None = None) -> list[list[str]]:
        """Answers under each variant, ``texts[variant][sample]``, without judging them."""

    def compare(
        self, batch: Batch, variants: Intervention, kept: KeptPrompts | None = None
    ) -> list[tuple[list[str], Tensor]]:
        """Answers under each variant, with their rewards ``(batch,)`` float64 on the CPU.

        Prompts are read once for all calls with the same ``kept``.
        """


class Generating:
    """Answers are generated, and judged by the task's reward.

    Args:
        decoder: A decoder with the task's limits.
        task: The task.
        reverse: Whether one minus the reward is the reward.
    """

    schedule: Schedule | None = None

    def __init__(self, decoder: Decoder, task: Task, reverse: bool = False) -> None:
        self.decoder, self.task, self.reverse = decoder, task, reverse

    def observe(self, batch: Batch, reader: PoolReader | None = None) -> list[str]:
        """Answers of the unchanged model, while ``reader`` pools its activations at the decoding steps."""
        return self.decoder.generate(batch, reader)

    def rewards(self, texts: list[str], batch: Batch) -> Tensor:
        """The task's rewards, ``(batch,)`` float64."""
        return judged(self.task, texts, batch, self.reverse)

    def texts(self, batch: Batch, variants: Intervention, kept: KeptPrompts | None = None) -> list[list[str]]:
        """Answers under each variant."""
        return self.decoder.compare(batch, variants, kept=kept)

    def compare(
        self, batch: Batch, variants: Intervention, kept: KeptPrompts | None = None
    ) -> list[tuple[list[str], Tensor]]:
        """Answers under each variant, and their rewards."""
        return [(texts, self.rewards(texts, batch)) for texts in self.texts(batch, variants, kept)]


class Weighing(Generating):
    """Nothing is generated: the answer is what the task makes of the likelihoods of an example's options.

    Args:
        decoder: What runs the model.
        task: The task.
        data: Gives the tokens of options.
        reverse: Whether one minus the reward is the reward.
    """

    def __init__(self, decoder: Decoder, task: Task, data: TaskDataModule, reverse: bool = False) -> None:
        super().__init__(decoder, task, reverse)
        self.data = data

    def observe(self, batch: Batch, reader: PoolReader | None = None) -> list[str]:
        """Answers of the unchanged model, while ``reader`` pools its activations at the last token of the prompt."""
        if reader is not None:
            self.decoder.generate(batch, reader)
        return self.texts(batch, Switched([None]))[0]

    def texts(self, batch: Batch, variants: Intervention, kept: KeptPrompts | None = None) -> list[list[str]]:
        """What is likeliest under each variant."""
        options = [self.data.option_ids(example) for example in batch.examples]
        nats = self.decoder.log_likelihoods(batch, options, variants, kept)
        with users_own(f"likeliest of {type(self.task).__name__}"):
            return [
                [
                    self.task.likeliest(example, of_variants[variant].tolist(), list(map(len, some)))
                    for example, of_variants, some in zip(batch.examples, nats, options, strict=True)
                ]
                for variant in range(len(variants))
            ]


def answered(decoder: Decoder, task: Task, data: TaskDataModule, reverse: bool = False) -> Generating:
    """How a task with answers is answered."""
    return Weighing(decoder, task, data, reverse) if task.by_likelihood else Generating(decoder, task, reverse)


@dataclass(frozen=True)
class ProbeReading:
    """A probe, with the autoencoder whose features it looks at.

    Attributes:
        probe: Tells from pooled activations how probable a reward is.
        sae: The autoencoder.
        pool: How activations over a text become one number.
    """

    probe: Probe
    sae: Encoder
    pool: str

    def probabilities(self, decoder: Decoder, batch: Batch, variants: Intervention) -> list[Tensor]:
        """Probability of a reward for each text under each variant, ``(batch,)`` float64 each."""
        found: list[Tensor] = []
        for group in decoder.groups(batch, variants):
            reader = PoolReader({0: self.sae}, [self.pool])
            decoder.read(batch, reader, group)
            values = self.probe.probability(reader.pools[0][self.pool].value).cpu()  # (B * group,)
            found += [values[variant :: len(group)] for variant in range(len(group))]
        return found[: len(variants)]


class Reading:
    """Texts are read; a probe says how probable their label is.

    Args:
        decoder: What reads.
        task: The task, whose rewards are the labels.
        reverse: Whether the texts without the label are the rewarded ones.
        probe: Gives the probe that a fit has made; raises if there is none.
    """

    schedule: Schedule | None = EVERYWHERE

    def __init__(self, decoder: Decoder, task: Task, reverse: bool, probe: Callable[[], ProbeReading]) -> None:
        self.decoder, self.task, self.reverse, self.probe = decoder, task, reverse, probe

    def observe(self, batch: Batch, reader: PoolReader | None = None) -> list[str]:
        """Nothing is answered; ``reader`` pools the activations of the texts."""
        if reader is not None:
            self.decoder.read(batch, reader)
        return [""] * len(batch.examples)

    def rewards(self, texts: list[str], batch: Batch) -> Tensor:
        """The labels, ``(batch,)`` float64."""
        return judged(self.task, texts, batch, self.reverse)

    def texts(self, batch: Batch, variants: Intervention, kept: KeptPrompts | None = None) -> list[list[str]]:
        """The probability of the label under each variant, in figures."""
        return [texts for texts, _ in self.compare(batch, variants)]

    def compare(
        self, batch: Batch, variants: Intervention, kept: KeptPrompts | None = None
    ) -> list[tuple[list[str], Tensor]]:
        """The probability of the label under each variant, in figures, and the probability of a reward."""
        # The probe was fitted on rewards. If those are reversed, it gives the probability that the label is absent.
        rewards = self.probe().probabilities(self.decoder, batch, variants)
        labels = [1 - some if self.reverse else some for some in rewards]
        return [([f"{p:.4f}" for p in some.tolist()], reward) for some, reward in zip(labels, rewards, strict=True)]


def judged(task: Task, texts: list[str], batch: Batch, reverse: bool) -> Tensor:
    """A task's rewards of one answer per sample, ``(batch,)`` float64 on the CPU.

    Raises:
        UserError: The task gives another number of rewards, or one that is not between 0 and 1.
    """
    values = torch.tensor(rewards_of(task, texts, batch.examples), dtype=torch.float64)
    return 1 - values if reverse else values
