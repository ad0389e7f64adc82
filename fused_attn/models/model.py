"""What models share: their weights are drawn afresh in one call."""

from __future__ import annotations

from functools import partial

from torch import nn

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)


class Model(nn.Module):
    """A module with an initialisation that goes beyond that of its layers."""

    def reset_parameters(self) -> None:
        """Draw all weights afresh and forget the statistics of batch norms, submodules included.

        After ``to_empty``, for a model that was built on the meta device.  A loop over ``model.modules()`` that calls
        every ``reset_parameters`` draws the same if it is in reverse order; else the layers, which come after the
        model, end at PyTorch's defaults.
        """
        for module in reversed([*self.modules()][1:]):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights that do not start as their layer's own ``reset_parameters`` draws them."""


class ResidualModel(Model):
    """A model whose convolutions start at He's normal initialisation (fan-out)."""

    def initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
