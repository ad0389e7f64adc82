"""What all models share: their weights are drawn afresh in one call."""

from __future__ import annotations

from torch import nn


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
