"""Valid calls made invalid."""

from collections.abc import Callable
from typing import Any

import torch

CPU, F32 = torch.device("cpu"), torch.float32


def changed(make: Callable[[], dict[str, Any]], **changes: Any) -> Callable[[], dict[str, Any]]:
    """A valid call with some arguments replaced; a callable is applied to the argument."""

    def build() -> dict[str, Any]:
        torch.manual_seed(0)
        inputs = make()
        for name, change in changes.items():
            inputs[name] = change(inputs[name]) if callable(change) else change
        return inputs

    return build
