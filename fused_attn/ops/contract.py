"""What an op's ``spec.py`` declares: the lever that the contract test and the benchmarks run on.

``tests/test_op_contract.py`` and ``fused-attn bench`` know no op by name.  They read ``SPECS`` (in
``fused_attn/ops/__init__.py``), so a new op is one new folder and one new line there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

#: Makes the keyword arguments of one call: ``make(dtype, device)``; random, seeded by the sample's name.
MakeInputs = Callable[[torch.dtype, torch.device], dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """One valid call of an op.

    ``make`` draws fresh tensors at every call (seed it with ``torch.manual_seed`` outside).  ``small`` samples
    also go through gradcheck in float64 and through the Triton interpreter, both of which are slow.
    """

    name: str
    make: MakeInputs
    small: bool = False


@dataclass(frozen=True)
class BadInput:
    """One invalid call, the exception it must raise and a regular expression its message must match."""

    name: str
    make: Callable[[], dict[str, Any]]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class Shape:
    """One benchmark case: ``make`` as in :class:`Sample`, plus the least work any implementation must do."""

    name: str
    make: MakeInputs
    flops_forward: int
    flops_backward: int
    bytes_forward: int
    bytes_backward: int


@dataclass(frozen=True)
class Peer:
    """What a user would otherwise write.  ``build(inputs)`` returns a callable over the same keyword arguments.

    It raises ``NotImplementedError`` with the reason when the peer cannot run the case.
    """

    name: str
    build: Callable[[Mapping[str, Any]], Callable[..., torch.Tensor]]


@dataclass(frozen=True)
class OpSpec:
    """Everything the contract test and the benchmark runner need to know about one op."""

    name: str
    function: Callable[..., torch.Tensor]
    #: implementation name -> can_run(query-like inputs...) as used by the op's api
    implementations: Mapping[str, Callable[..., "str | None"]]
    samples: tuple[Sample, ...]
    bad_inputs: tuple[BadInput, ...]
    shapes: tuple[Shape, ...] = ()
    peers: tuple[Peer, ...] = ()
    #: dtypes each implementation must pass the contract in
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    #: draws one random valid call for the shape fuzz: (hypothesis draw function) -> (MakeInputs)
    fuzz: Callable[[Any], MakeInputs] | None = None
    #: further notes printed by ``fused-attn info``
    notes: Mapping[str, str] = field(default_factory=dict)
