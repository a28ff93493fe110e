"""Fine-tuning on gold answers, the baseline that changes every weight, or low-rank adapters beside them."""

from typing import Literal

import torch
from torch import Tensor, nn

from corrsteer_pl.data import Batch
from corrsteer_pl.errors import UserError
from corrsteer_pl.interventions.adapter import Lora, OwnWeights
from corrsteer_pl.methods.adapting import Adapting
from corrsteer_pl.methods.base import Settings
from corrsteer_pl.methods.checks import check_adapter
from corrsteer_pl.models.llm import positions_of
from corrsteer_pl.tasks import Example

# Learning rates for whole weights: few steps need a smaller one.
RATE, RATE_OF_FEW, FEW = 1e-5, 5e-6, 2000
# Low-rank matrices need a larger one than whole weights.
RATE_OF_LORA = 1e-4


class Finetune(Adapting):
    """Trains on the gold answers of a task's fit split; the loss is on the tokens of the answer alone.

    One pass, as every fit. The answer is what a solved example shows: the letter of a multiple-choice question, the
    solution of a problem. It ends with the end of the text where the task lets the model generate that.

    Args:
        llm: Path or Hub id of a causal language model, or ``demo``.
        adapter: ``full`` for all weights, of which the checkpoint then has a copy; ``lora`` for low-rank matrices
            beside the linear layers, by peft.
        adapter_layers: Blocks that get low-rank matrices, from 0; None for all.
        rank: Their rank.
        alpha: Their strength, of which ``alpha / rank`` counts; None for twice the rank.
        dropout: Share of their inputs that are dropped in training.
        lr: Highest learning rate; None for 1e-5, or 5e-6 if the fit has fewer than 2,000 steps, and for 1e-4 with
            ``lora``.
        weight_decay: AdamW's.
        dtype: The model's precision: ``float32``, ``bfloat16`` or ``float16``. Whole weights are trained in it.
        llm_args: Further options for loading the model: ``revision``, ``attn_implementation``,
            ``trust_remote_code``, ``blocks`` (where its decoder blocks are).
        candidate_batch_size: As for other methods; here variants never share a forward pass.
        noise_floor: Let a test answer unsteered once more, in other batches: how many answers rounding alone changes.

    Source:
        The baseline of CorrSteer, arXiv 2508.12535.
    """

    settings = Settings(
        settled=("adapter", "adapter_layers", "rank", "alpha"),
        resumed=("dtype", "lr", "weight_decay", "dropout"),
        tested=("dtype", "llm_args"),
    )

    def __init__(
        self,
        llm: str,
        adapter: Literal["full", "lora"] = "full",
        adapter_layers: list[int] | None = None,
        rank: int = 8,
        alpha: int | None = None,
        dropout: float = 0.0,
        lr: float | None = None,
        weight_decay: float = 0.01,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        llm_args: dict | None = None,
        candidate_batch_size: int | str = "auto",
        noise_floor: bool = False,
    ) -> None:
        super().__init__(llm, dtype, llm_args, candidate_batch_size)
        self.save_hyperparameters()
        check_adapter(self.hparams)
        if adapter not in ("full", "lora"):
            raise UserError(f"model.adapter is {adapter!r}; choose one of full, lora.")

    def new_adapter(self) -> Lora | OwnWeights:
        """A copy of all weights, or low-rank matrices."""
        h = self.hparams
        if h["adapter"] == "full":
            return OwnWeights()
        alpha = 2 * h["rank"] if h["alpha"] is None else h["alpha"]
        return Lora(h["adapter_layers"], h["rank"], alpha, h["dropout"], self.datamodule.hparams["seed"])

    def begin(self) -> None:
        """See that there are answers to learn from, and make the weights a part of the model.

        Raises:
            UserError: There are none.
        """
        task, examples = self.datamodule.fit_task, self.datamodule.examples["train"]
        if unsolved := [example for example in examples if example.solution is None]:
            raise UserError(
                f"finetune learns from gold answers, but {unsolved[0].id} has none: the task "
                f"{self.datamodule.fit_rows.name} judges responses without one. Choose another task."
            )
        if not task.generates:
            raise UserError("finetune learns to answer, but data.fit_on has texts. Leave it out.")
        super().begin()

    @property
    def learning_rate(self) -> float:
        """The given one, or the one for so many steps."""
        h = self.hparams
        if h["lr"] is not None:
            return h["lr"]
        return RATE_OF_LORA if h["adapter"] == "lora" else RATE if self.steps >= FEW else RATE_OF_FEW

    def answer_ids(self, example: Example) -> list[int]:
        """Tokens of the gold answer as they follow the prompt."""
        solution, data = str(example.solution), self.datamodule
        ids = self.llm.following_ids(solution if data.uses_chat(self.llm) else f" {solution}")
        ends = self.llm.eos_token_ids[:1] if data.fit_task.max_new_tokens > len(ids) else []
        return [*ids, *ends]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the answer tokens, each sample counting once."""
        prompts = [self.datamodule.token_ids(example, self.datamodule.fit_task) for example in batch.examples]
        answers = [self.answer_ids(example) for example in batch.examples]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        ids, mask = (tensor.to(batch.input_ids.device) for tensor in self.llm.left_pad(rows))
        longest = max(map(len, answers))
        with self.own.active(training=True):
            logits = self.llm.forward(ids, mask, positions_of(mask), last=longest + 1)[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, -longest:].flatten(), reduction="none"
        )
        counts = torch.tensor([len(answer) for answer in answers], device=ids.device)
        # Answers stand at the end of left-padded rows.
        counted = torch.arange(longest, 0, -1, device=ids.device) <= counts.unsqueeze(1)
        each = (losses.view(len(rows), longest) * counted).sum(1) / counts
        loss = self.mean_over_processes(each @ batch.weight.to(each), batch.weight.sum())
        self.log_loss("loss", loss)
        return loss
