"""Comparison by a probe, for texts that are read and not continued."""

from dataclasses import dataclass

from torch import Tensor

from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.decoding.decode import Decoder, Prompts
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.sae import SparseAutoencoder
from corrsteer_pl.stats import Probe

# A text is read in one pass, so steering means steering all of it.
EVERYWHERE = Schedule("all")


@dataclass
class ProbeReading:
    """A probe with the autoencoder whose features it looks at.

    Attributes:
        probe: The probe.
        sae: The autoencoder.
        pool: How activations over a text become one number.
    """

    probe: Probe
    sae: SparseAutoencoder
    pool: str

    def compare(self, decoder: Decoder, prompts: Prompts, variants: SteeringVectors) -> list[Tensor]:
        """Probability of the label in each text under each variant; ``(batch,)`` float64 for each."""
        found: list[Tensor] = []
        for group in variants.groups(decoder.together(prompts, len(variants))):
            reader = PoolReader({0: self.sae}, [self.pool])
            decoder.read(prompts, reader, group)
            probabilities = self.probe.probability(reader.pools[0][self.pool].value)  # (B * copies,)
            found += [probabilities[variant :: len(group)] for variant in range(len(group))]
        return found[: len(variants)]
