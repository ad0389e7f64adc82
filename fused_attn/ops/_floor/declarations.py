"""What an op's ``spec.py`` declares: ``SPECS``, a tuple of :class:`OpSpec`.

The contract test and the benchmarks know no op by name.  They read ``fused_attn.ops.SPECS``, which holds what the
``spec.py`` of every folder declares.
"""

from __future__ import annotations

import inspect
import random
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

#: Makes the keyword arguments of one call, drawing from PyTorch's CPU generator.
MakeInputs = Callable[[torch.dtype, torch.device], dict[str, Any]]

# --- declarations -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One valid call of an op.

    ``small`` samples also go through what is slow per element: gradcheck in float64, opcheck, ``torch.compile``
    and the Triton interpreter.
    """

    name: str
    make: MakeInputs
    small: bool = False

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", draw: int = 0) -> dict[str, Any]:
        """Fresh keyword arguments; the same values for the same ``draw``, because the name is the seed."""
        with torch.random.fork_rng(devices=[]):
            seed_generators(zlib.crc32(self.name.encode()) + draw)
            return self.make(dtype, torch.device(device))


def drawn(make: Callable[..., dict[str, Any]], settings: Mapping[str, Any]) -> Sample:
    """A sample of drawn settings.  Its name is their text, the same in every process, as it is the seed."""

    def text(value: Any) -> Any:
        return tuple(map(text, value)) if isinstance(value, tuple) else getattr(value, "__name__", value)

    return Sample(str({key: text(value) for key, value in settings.items()}), partial(make, **settings))


@dataclass(frozen=True)
class Shape(Sample):
    """One benchmark case, with the least work that any implementation must do for it.

    FLOPs are those of the products; bytes are every input read and every output written once, in float32.
    ``memory_limit`` bounds what a fused implementation may hold beyond the inputs while it runs forward and
    backward in float32, in bytes.  ``sizes`` are the arguments of ``OpSpec.make_shape`` that make this case.
    ``memory_only`` cases are too large for the reference, so that nothing can be checked and timed on them.
    """

    flops_forward: int = 0
    flops_backward: int = 0
    bytes_forward: int = 0
    bytes_backward: int = 0
    memory_limit: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    memory_only: bool = False


@dataclass(frozen=True)
class Peer:
    """What a user would otherwise write.

    ``build(inputs)`` does what can be done once (index tables, one-hot features, compilation) and returns a callable
    over the same keyword arguments.  It raises ``NotImplementedError`` with the reason when the peer cannot run
    the case.  ``requires`` maps modules that it imports to the command that installs them; ``forward_only`` names the
    device types on which it has no backward pass.
    """

    name: str
    build: Callable[[Mapping[str, Any]], Callable[..., Tensor]]
    requires: Mapping[str, str] = field(default_factory=dict)
    forward_only: tuple[str, ...] = ()


def given(function: Callable[..., Tensor]) -> Callable[[Mapping[str, Any]], Callable[..., Tensor]]:
    """``Peer.build`` of a function with nothing to be done once."""
    return lambda inputs: function


def compiled(
    build: Callable[[Mapping[str, Any]], Callable[..., Tensor]],
) -> Callable[[Mapping[str, Any]], Callable[..., Tensor]]:
    """``Peer.build`` of another peer's function compiled, specialised to the shape: dynamic ones would handicap it."""
    return lambda inputs: torch.compile(build(inputs), fullgraph=True, dynamic=False)


@dataclass(frozen=True)
class OpSpec:
    """Everything the contract test and the benchmark runner need to know about one op."""

    name: str
    #: the public function; it takes the inputs and ``impl`` as keywords
    function: Callable[..., Tensor]
    #: implementation name -> why it cannot run on the inputs, or None; in the order ``auto`` prefers them
    implementations: Mapping[str, Callable[[Mapping[str, Any]], str | None]]
    samples: tuple[Sample, ...]
    #: draws one random valid call for the shape fuzz
    fuzz: Callable[[random.Random], Sample]
    #: the registered operators an implementation consists of, with arguments: (impl, inputs) -> ((operator, args), ...)
    operators: Callable[[str, Mapping[str, Any]], tuple[tuple[Any, tuple], ...]]
    shapes: tuple[Shape, ...] = ()
    #: the same call at growing sizes, smallest first: shows how memory grows
    growth: tuple[Shape, ...] = ()
    #: benchmark cases of a size that fills a GPU; ``shapes`` where there are none
    gpu_shapes: tuple[Shape, ...] = ()
    #: makes a benchmark case from sizes, its positional arguments: what ``fused-attn bench --shape`` calls
    make_shape: Callable[..., Shape] | None = None
    peers: tuple[Peer, ...] = ()
    #: dtypes every implementation must pass the contract in
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    #: the float32 inputs of a call as the op computes on them under autocast to a dtype, on the CPU
    autocast: Callable[[Mapping[str, Any], torch.dtype], Mapping[str, Any]] = lambda inputs, dtype: convert(
        inputs, dtype
    )
    #: further notes printed by ``fused-attn info``
    notes: Mapping[str, str] = field(default_factory=dict)

    def reason(self, impl: str, inputs: Mapping[str, Any]) -> str | None:
        """Why ``impl`` cannot run on ``inputs``; None when it can."""
        if impl not in self.implementations:
            return f"{self.name} has no implementation {impl!r}"
        return self.implementations[impl](inputs)

    def shape(self, name: str) -> Shape:
        """The benchmark case of that name, or one made from sizes: ``"B=8,heads=8,H=32,..."``.

        Raises:
            KeyError: there is no case of that name.
            ValueError: a size is missing, unknown or not a positive number; the text names those that there are.
        """
        if "=" in name:
            return self._shape_of_sizes(name)
        for shape in (*self.shapes, *self.gpu_shapes, *self.growth):
            if shape.name == name:
                return shape
        raise KeyError(f"{self.name} has no shape {name!r}")

    def _shape_of_sizes(self, text: str) -> Shape:
        if self.make_shape is None:
            raise ValueError(f"{self.name} has no shapes but those in its spec")
        known = {
            parameter.name: parameter.default is parameter.empty
            for parameter in inspect.signature(self.make_shape).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        }
        required, optional = ([key for key, must in known.items() if must is kind] for kind in (True, False))
        keys = ", ".join(required) + (f" and, if wanted, {', '.join(optional)}" if optional else "")
        expected = f"a shape of {self.name} must be KEY=NUMBER,... with the keys {keys}"
        sizes = {}
        for part in text.split(","):
            key, _, value = (piece.strip() for piece in part.partition("="))
            if key not in known or key in sizes or not value.isdecimal() or int(value) < 1:
                raise ValueError(f"{expected}, each once, and positive numbers; got {part.strip()!r}")
            sizes[key] = int(value)
        missing = [key for key in required if key not in sizes]
        if missing:
            raise ValueError(f"{expected}; {', '.join(missing)} missing in {text!r}")
        return self.make_shape(**sizes)


# --- layouts of a sample's tensors --------------------------------------------------------------------------------


def contiguous(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def spread(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every second element of every axis."""
    return contiguous([2 * size for size in shape], dtype, device)[tuple(slice(1, None, 2) for _ in shape)]


def expanded(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One image expanded over the batch: stride 0."""
    return contiguous((1, *shape[1:]), dtype, device).expand(shape)


# --- calls ----------------------------------------------------------------------------------------------------------


def seed_generators(seed: int) -> None:
    """Seed the generators of the CPU and of the GPUs that are there.

    ``torch.manual_seed`` on a machine without GPU queues a call with its stack trace for later, which takes longer than
    most ops.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a call by name; those of a list are called ``values[0]``, ``values[1]``, ..."""
    found = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, (list, tuple)):
            found |= {f"{name}[{i}]": item for i, item in enumerate(value) if isinstance(item, Tensor)}
    return found


def differentiable(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call that receive a gradient, by name: the floating-point ones."""
    return {name: tensor for name, tensor in tensors(inputs).items() if tensor.is_floating_point()}


def with_tensors(inputs: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """The same call with some of its :func:`tensors` replaced."""
    return {
        name: [changed.get(f"{name}[{i}]", item) for i, item in enumerate(value)]
        if isinstance(value, (list, tuple))
        else changed.get(name, value)
        for name, value in inputs.items()
    }


def convert(inputs: Mapping[str, Any], dtype: torch.dtype, keep: Collection[str] = ()) -> dict[str, Any]:
    """The same call with its floating-point tensors in ``dtype``, except those whose names are in ``keep``."""
    return with_tensors(
        inputs, {name: tensor.to(dtype) for name, tensor in differentiable(inputs).items() if name not in keep}
    )


def unchanged(inputs: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    """``OpSpec.autocast`` of an op that computes in the dtype of its inputs."""
    return inputs


def leaves(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The differentiable tensors of a call as leaves that require a gradient."""
    return {name: tensor.detach().requires_grad_() for name, tensor in differentiable(inputs).items()}
