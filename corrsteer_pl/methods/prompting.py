"""Prompting: the same model, asked with a system message or with solved examples before the question."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.errors import UserError, one_line
from corrsteer_pl.evaluation.tables import whole_table
from corrsteer_pl.interventions.switched import Switched
from corrsteer_pl.methods.answers.answering import Answering
from corrsteer_pl.methods.base import Settings
from corrsteer_pl.methods.runs.provenance import damaged
from corrsteer_pl.methods.selecting import Selecting
from corrsteer_pl.models.decoding.decode import Intervention
from corrsteer_pl.models.decoding.kept import KeptPrompts
from corrsteer_pl.selection import Selection
from corrsteer_pl.tasks import Task


class Prompting(Selecting):
    """Compares answers to the plain prompt with those to one that has more before it, the baseline that costs nothing.

    A fit takes the solved examples from the fit split and learns nothing else.

    Args:
        llm: Path or Hub id of a causal language model, a GGUF file, or ``demo``.
        system_message: Stands first, where prompts are put into a chat template; in place of ``data.system_prompt``.
        examples: How many solved examples stand before each prompt, beside ``data.shots``.
        dtype: The model's precision: ``float32``, ``bfloat16`` or ``float16``.
        llm_args: Further options for loading the model.
        candidate_batch_size: As for other methods.
        noise_floor: Let a test answer unsteered once more, in other batches: how many answers rounding alone changes.
    """

    settings = Settings(settled=("examples",), tested=("system_message", "dtype", "llm_args"))

    def __init__(
        self,
        llm: str,
        system_message: str | None = None,
        examples: int = 0,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        llm_args: dict | None = None,
        candidate_batch_size: int | str = "auto",
        noise_floor: bool = False,
    ) -> None:
        super().__init__(llm, dtype, llm_args, candidate_batch_size)
        self.save_hyperparameters()
        if examples < 0:
            raise UserError(f"model.examples is {examples}; it is a number of examples, at least 0.")
        if system_message is None and not examples:
            raise UserError("prompting has nothing to put before prompts. Set model.system_message or model.examples.")
        self.turns: list[str] = []
        self.selection: Selection | None = None
        self.snapshots: list[dict[str, Any]] = []

    @property
    def learnt_from(self) -> int:
        """The solved examples."""
        return self.hparams["examples"]

    def setup(self, stage: str) -> None:
        """Set up, and check that the chat template renders the system message.

        Raises:
            UserError: There is no chat template, or it loses the system message.
        """
        super().setup(stage)
        message = self.hparams["system_message"]
        if message is None:
            return
        if not self.datamodule.uses_chat(self.llm):
            raise UserError(
                "model.system_message needs a chat template, but prompts are not put into one. Leave it out, or take "
                "an instruction model with its template."
            )
        # A template that ignores it would make both variants the same model.
        self.llm.prompt_text(["Hello"], chat=True, system=message)

    def begin(self) -> None:
        """Take the solved examples.

        Raises:
            UserError: There are too few.
        """
        count, examples = self.hparams["examples"], self.datamodule.examples["train"]
        solved = [example for example in examples if example.solution is not None][:count]
        if len(solved) < count:
            raise UserError(
                f"model.examples is {count}, but the fit split has {len(solved)} examples with a solution to show. Set "
                "it lower, or leave it out."
            )
        self.turns = [turn for example in solved for turn in (example.prompt, str(example.solution))]
        self.selection, self.snapshots = None, []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Learn nothing but count the samples."""
        with self.counting():
            pass
        return torch.zeros((), requires_grad=True)

    def answering_for(self, task: Task, stage: Literal["fit", "evaluation"]) -> Answering:
        """How a task is answered: to the plain prompt, or to the one with more before it, by the variant."""
        return _Prompted(super().answering_for(task, stage), self)

    def prompted(self, batch: Batch) -> Batch:
        """The batch with more before each prompt."""
        data, system = self.datamodule, self.hparams["system_message"]
        chat = data.uses_chat(self.llm)
        system = data.hparams["system_prompt"] if system is None else system
        rows = [self.llm.prompt_ids([*self.turns, *data.turns(e)], chat, system) for e in batch.examples]
        ids, mask = (tensor.to(batch.input_ids.device) for tensor in self.llm.left_pad(rows))
        return replace(batch, input_ids=ids, attention_mask=mask)

    def answers(self, batch: Batch, changed: bool) -> list[str]:
        """Answers to the plain prompt, or to the one with more before it."""
        return super().answers(self.prompted(batch) if changed else batch, changed=False)

    def conclude(self, rewards: Tensor) -> None:
        """Say what the longer prompt reaches on the validation split."""
        self.select_whole(rewards, "prompted")

    def tables(self) -> list[Table]:
        """What validation said."""
        return [whole_table(self.selection)] if self.selection else []

    def comparison(self) -> Switched:
        """The model twice: the second time with another prompt."""
        return Switched([None, None])

    def state(self) -> dict[str, Any]:
        """The solved examples, and what validation said."""
        return {**super().state(), "turns": self.turns}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the solved examples, and what validation said."""
        try:
            self.turns = [str(turn) for turn in state["turns"]]
        except (KeyError, TypeError) as error:
            raise damaged(f"its solved examples cannot be read ({one_line(error)})") from error
        super().restore(state)


class _Prompted:
    """Answers the second of two variants to another prompt."""

    def __init__(self, plain: Answering, method: Prompting) -> None:
        self.plain, self.method = plain, method
        self.decoder, self.schedule = plain.decoder, plain.schedule

    def observe(self, batch: Batch, reader: Any = None) -> list[str]:
        return self.plain.observe(batch, reader)

    def rewards(self, texts: list[str], batch: Batch) -> Tensor:
        return self.plain.rewards(texts, batch)

    def texts(self, batch: Batch, variants: Intervention, kept: KeptPrompts | None = None) -> list[list[str]]:
        unchanged: Any = Switched([None])
        batches: Sequence[Batch] = [batch, self.method.prompted(batch)][: len(variants)]
        return [self.plain.texts(some, unchanged)[0] for some in batches]

    def compare(
        self, batch: Batch, variants: Intervention, kept: KeptPrompts | None = None
    ) -> list[tuple[list[str], Tensor]]:
        return [(texts, self.rewards(texts, batch)) for texts in self.texts(batch, variants, kept)]
