"""Contrastive vectors: the difference between the mean residuals of right and of wrong answers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.base import Settings
from corrsteer_pl.methods.checks import check_steering
from corrsteer_pl.methods.streaming import Streaming
from corrsteer_pl.models.coordinates import Coordinates, coordinates
from corrsteer_pl.selection import Feature, Selection
from corrsteer_pl.stats.scores import class_difference, mean_right, mean_wrong


class MeanDifference(Streaming):
    """Steers with each layer's difference of means, where that helps on the validation split.

    A layer's vector is the mean residual over the generated tokens of right answers, less that of wrong ones, each
    answer counting once. Its candidates have no correlation; their coefficient is the length of that difference, and
    their means are those of the projections on it.

    Args:
        llm: Path or Hub id of a causal language model, a GGUF file, or ``demo``.
        layers: Blocks to read and steer, from 0; None for all.
        rule: ``foreach``: each layer's vector, if it alone beats the unsteered model. ``global``: the best of all.
            ``all``: every layer's, untested. ``layer``: that of the one layer named in ``layers``. ``greedy``: what
            helps most beside what was chosen before, as long as the whole gets better.
        min_improvement: For the rules ``foreach`` and ``greedy``: the mean validation reward has to rise by more than
            this for a vector to be chosen.
        significance_level: For the same rules: the largest p-value of a one-sided exact sign test that more validation
            samples get better than worse; None asks for no test.
        scale: Factor on all vectors. Of a list, such as ``[0.5, 1, 2]``, validation chooses the one with the best
            reward of the whole selection within the budget; vectors are tried at 1 before, and a warning tells if
            that is at an edge of the list. ``auto`` searches for it: 0.5, 1 and 2, then twice or half of the best while
            that is at an edge and within the budget, then midpoints around the best.
        budget: What steering may cost, for a list of scales or ``auto``, as for CorrSteer: ``kl``, ``loss``, ``task``,
            ``size``.
        positions: ``generated`` (the last prompt position and every generated one), ``all``, ``prompt_last``,
            or ``first_k`` generated tokens.
        first_k: Number of tokens for ``positions: first_k``.
        decay: Factor on the strength from one generated token to the next.
        site: ``resid_post``, ``resid_pre``, ``attn_out`` or ``mlp_out`` of each block.
        dtype: The model's precision: ``float32``, ``bfloat16`` or ``float16``. The sums are float64 whatever it is.
        llm_args: Further options for loading the model: ``revision``, ``attn_implementation``, ``device_map``,
            ``quantize`` (4 or 8 bits), ``trust_remote_code``, ``blocks`` (where its decoder blocks are).
        candidate_batch_size: How many candidates of every prompt, one of them unsteered, share a forward pass; ``auto``
            for as many as about a gibibyte, or a sixteenth of a GPU's memory, allows.
        noise_floor: Let a test answer unsteered once more, in other batches: how many answers rounding alone changes.

    Source:
        CAA, arXiv 2312.06681, with the model's own right and wrong answers as the two classes.
    """

    settings = Settings(
        settled=("site", "min_improvement", "significance_level"),
        tested=("scale", "rule", "layers", "positions", "first_k", "decay", "dtype", "llm_args"),
    )
    pool = "mean"

    def __init__(
        self,
        llm: str,
        layers: list[int] | None = None,
        rule: Literal["foreach", "global", "all", "layer", "greedy"] = "foreach",
        min_improvement: float = 0.0,
        significance_level: float | None = None,
        scale: float | list[float] | Literal["auto"] = 1.0,
        budget: dict | None = None,
        positions: Literal["generated", "all", "prompt_last", "first_k"] = "generated",
        first_k: int = 1,
        decay: float = 1.0,
        site: Literal["resid_post", "resid_pre", "attn_out", "mlp_out"] = "resid_post",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        llm_args: dict | None = None,
        candidate_batch_size: int | str = "auto",
        noise_floor: bool = False,
    ) -> None:
        super().__init__(llm, dtype, llm_args, candidate_batch_size)
        self.save_hyperparameters()
        check_steering(self.hparams)
        self.ready()

    @property
    def pools(self) -> list[str]:
        """The mean over the generated tokens alone."""
        return [self.pool]

    def described(self, selection: Selection) -> Selection:
        """The selection with the name of what its candidates are listed by."""
        return replace(selection, score="difference")

    def load_encoders(self, layers: list[int] | None = None) -> Mapping[int, Coordinates]:
        """The residual's coordinates at each layer."""
        return coordinates(self.llm, layers or self.hparams["layers"], self.hparams["site"])

    def propose(self) -> tuple[Feature, ...]:
        """A vector per layer.

        Raises:
            UserError: There is only one class of answers.
        """
        count = round(self.moments.n.item())
        if self.has_seen_all and self.moments.n == self.moments.n_right:
            raise UserError(
                f"all {count} rewards are above 0, so there are no wrong samples to differ from. Choose a reward that "
                "is 0 for a wrong answer, or the method corrsteer."
            )
        self.directions, found = {}, []
        for layer, encoder in self.encoders.items():
            moments = self.sums.moments(layer, self.pool)
            difference = class_difference(moments)
            size = difference.norm().item()
            direction = difference / max(size, 1e-12)
            right, wrong = ((mean(moments) @ direction).item() for mean in (mean_right, mean_wrong))
            feature = Feature(
                layer=layer, site=str(encoder.site), index=0, sign="positive", coefficient=size, correlation=None,
                score=size, active_right=1.0, active_wrong=1.0, mean_right=right, mean_wrong=wrong,
            )  # fmt: skip
            self.directions[feature.name] = direction.float().cpu()
            found.append(feature)
        return tuple(found)
