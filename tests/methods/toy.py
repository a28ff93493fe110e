"""A whole method in a dozen lines: one trained bias at a block's output. Once imported, the command line knows it."""

import torch
from torch import nn

from corrsteer_pl.interventions.steering import SteeringVectors
from corrsteer_pl.methods.base import Method, Settings
from corrsteer_pl.methods.registry import METHODS
from corrsteer_pl.models.llm import positions_of
from corrsteer_pl.models.sites import Site


class Bias(Method):
    trains, settings = True, Settings(settled=("layer",), tested=("scale",))

    def __init__(self, llm: str, layer: int = 3, lr: float = 30.0, scale: float = 1.0) -> None:
        super().__init__(llm)
        self.save_hyperparameters()
        self.site, self.bias = Site(layer, "resid_post"), nn.Parameter(torch.zeros(128))

    def comparison(self):
        return SteeringVectors.stack([{}, {self.site: self.hparams["scale"] * self.bias.detach()}])

    def training_step(self, batch, batch_idx):
        with SteeringVectors({self.site: self.bias}).attached(self.llm.model):
            mask = batch.attention_mask
            logits = self.llm.forward(batch.input_ids, mask, positions_of(mask))[:, -1]
        gold = torch.tensor(self.llm.single_tokens([f" {letter}" for letter in "ABCD"]))
        wanted = gold[["ABCD".index(example.gold) for example in batch.examples]]
        losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
        return (losses * batch.weight).sum() / batch.weight.sum().clamp(min=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams["lr"])


METHODS["bias"] = "tests.methods.toy:Bias"
