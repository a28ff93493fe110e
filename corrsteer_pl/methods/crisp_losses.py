"""The unlearning term of CRISP in three forms: the paper's, the public code's and this package's.

Each function reads one layer and returns a sum and the count that it is divided by, so that batches and processes
merge by addition. The SAE's activations are in its own units, before any rescaling of its input is undone.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from corrsteer_pl.models.sae import SparseAutoencoder

# SAE, salient indices (k,), residual of target tokens (tokens, d_model) in the unchanged and in the trained model, lam.
Unlearning = Callable[[SparseAutoencoder, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Loss:
    """One form of the loss ``(1 - beta) * unlearn + beta * retain + weight * coherence``.

    Attributes:
        unlearning: Sum and count of the unlearning term of one layer.
        coherence_weight: The weight of coherence, from ``beta`` and ``gamma``.
        after_final_norm: Whether coherence compares hidden states after the final norm of the model, or the output of
            its last block.
    """

    unlearning: Unlearning
    coherence_weight: Callable[[float, float], float]
    after_final_norm: bool


def paper_unlearning(
    sae: SparseAutoencoder, salient: Tensor, before: Tensor, after: Tensor, lam: float
) -> tuple[Tensor, Tensor]:
    """Mean over tokens of ``sum_i a_i + lam * c_t``; ``c_t`` is the mean activation of all features at the token.

    Activations are those after the activation function, for ``a_i`` and for ``c_t``. A salient feature that has
    fallen silent has no gradient of its own; its token still has the gradient of ``c_t``.

    Source:
        CRISP, arXiv 2508.13650, eq. 9.
    """
    activations = sae.activate(sae.pre_activations(after)).float()  # (tokens, d_sae)
    per_token = activations[:, salient].sum(1) + lam * activations.mean(1)
    return per_token.sum(), per_token.new_tensor(len(per_token))


def authors_unlearning(
    sae: SparseAutoencoder, salient: Tensor, before: Tensor, after: Tensor, lam: float
) -> tuple[Tensor, Tensor]:
    """Mean over positive activations of salient features, with ``lam * |c_t|`` added before the activation function.

    ``c_t`` is the mean over all features of the values before the activation function. It is added only where a
    feature fires in the unchanged model, and lifts a feature over the threshold, so that its gradient remains.

    Source:
        github.com/tomerashuach/CRISP, ``crisp/unlearn.py``, ``get_features_acts`` and ``loss_features_acts``.
    """
    fired = sae.activate(sae.pre_activations(before))[:, salient] > 0  # (tokens, k)
    pre = sae.pre_activations(after)  # (tokens, d_sae)
    lifted = pre[:, salient] + lam * pre.mean(1, keepdim=True).abs() * fired
    activations = sae.activate(pre.index_copy(1, salient, lifted))[:, salient].float()
    positive = activations > 0
    return (activations * positive).sum(), positive.sum()


def own_unlearning(
    sae: SparseAutoencoder, salient: Tensor, before: Tensor, after: Tensor, lam: float
) -> tuple[Tensor, Tensor]:
    """Mean over tokens and salient features of ``a_i + lam * relu(pre_i)``, the second where the feature fired before.

    Features of a TopK autoencoder are read as if each were among the top ones, so only salient columns are computed.
    """
    columns = sae.columns(salient.tolist())
    positive_part, activations = columns(after)  # (tokens, k) each
    fired = columns(before)[1] > 0
    per_token = (activations + lam * positive_part * fired).float().mean(1)
    return per_token.sum(), per_token.new_tensor(len(per_token))


LOSSES = {
    "paper": Loss(paper_unlearning, lambda beta, gamma: gamma, after_final_norm=True),
    "authors": Loss(authors_unlearning, lambda beta, gamma: beta * gamma, after_final_norm=True),
    "ours": Loss(own_unlearning, lambda beta, gamma: gamma, after_final_norm=False),
}
