"""What an entry of the registry is, and what the layers of several hosts share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.bias_attention_2d.api import bias_attention_2d
from ..ops.rel_attention_2d.api import decomposed_bias_attention, rel_attention_2d
from ..ops.rel_attention_2d.conventions import sam_relative_logits
from ..ops.squeeze_excite.api import squeeze_excite


@dataclass(frozen=True)
class Host:
    """How one class of a host is served.

    Args:
        op: public name of the op that computes it.
        layer: a module without state whose ``forward``, with the signature of the host's ``forward`` or other method,
            is bound to the instance in its place; the conventions of Hugging Face's kernels library.
        reason: why an instance cannot be served; None: it can.
        faster_on_cpu: whether the CPU gains by it; if not, ``convert`` leaves modules on the CPU alone until their op
            is named.
    """

    op: str
    layer: type[nn.Module]
    reason: Callable[[Any], str | None]
    faster_on_cpu: bool = True


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module computes without its fused forward: that of its class."""
    return type(module).forward(module, *args, **kwargs)


def has_hooks(module: nn.Module, *names: str) -> str | None:
    """Why submodules cannot be passed over: they have hooks or methods of their own, which would not run."""
    for name in names:
        for part in module.get_submodule(name).modules():
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                return f"{name} has hooks, which would not run"
            if methods := own_methods(part):
                return f"{methods[0]} of {name} was replaced"
    return None


def own_methods(module: nn.Module) -> list[str]:
    """Names of methods that an instance has in place of its class's."""
    return [name for name in vars(module) if callable(getattr(type(module), name, None))]


def passes_over(module: nn.Module, **kinds: type[nn.Module]) -> str | None:
    """Why submodules, by name and class, cannot be passed over: they are something else, or have hooks."""
    for name, kind in kinds.items():
        if type(child := module.get_submodule(name)) is not kind:
            return f"{name} is a {class_path(type(child))}"
    return has_hooks(module, *kinds)


def class_path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def method_of(path: str) -> str:
    """The method that an entry of the registry is for: ``module:Class``, or ``module:Class.method``."""
    return path.partition(":")[2].partition(".")[2] or "forward"


def version_of(package: str) -> str:
    """What an imported package says of itself, or else was installed as; "0" where neither is known."""
    if (version := getattr(sys.modules[package], "__version__", None)) is not None:
        return version
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "0"


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version."""
    numbers = []
    for part in version.split(".")[:3]:
        digits = "".join(character for character in part if character.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


# --- rel_attention_2d -------------------------------------------------------------------------------------------------


def decomposed_attention(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, scale: float, dropout_p: float
) -> Tensor:
    """Attention of SAM, ViTDet and MViTv2, whose tables are resized where the grids ask for another length.

    Args:
        query: (B, heads, Hq, Wq, d); key and value (B, heads, Hk, Wk, d).
        rel_pos_h, rel_pos_w: (L, d), any L.
    """
    lengths = [a + b - 1 for a, b in zip(query.shape[2:4], key.shape[2:4], strict=True)]
    if query.shape[2:4] == key.shape[2:4] and [rel_pos_h.shape[0], rel_pos_w.shape[0]] == lengths:
        return rel_attention_2d(
            query, key, value, rel_pos_h, rel_pos_w,
            index="query_minus_key", scale=scale, rel_scale=1.0, dropout_p=dropout_p,
        )  # fmt: skip
    bias_h, bias_w = sam_relative_logits(query, rel_pos_h, rel_pos_w, (key.shape[2], key.shape[3]))
    return decomposed_bias_attention(query, key, value, bias_h, bias_w, scale=scale, dropout_p=dropout_p)


def heads_of_grid(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, W, 3 * heads * d), in this order, to three views (B, heads, H, W, d)."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 4, 1, 2, 5).unbind()
    return query, key, value


def joined_heads(out: Tensor) -> Tensor:
    """(B, heads, H, W, d) to (B, H, W, heads * d)."""
    return out.permute(0, 2, 3, 1, 4).flatten(3)


# --- bias_attention_2d ------------------------------------------------------------------------------------------------

#: What hides a pair of positions in Swin's masks, and everything below it.  A weight of exp(-100) is nothing in float32
#: beside one whose logit is not 80 lower.
HIDDEN = -100.0


def segments_of(mask: Tensor) -> Tensor:
    """A mask of windows as segments: the number of a position is the first one that it sees.

    Args:
        mask: (S, N, N), 0 where a position sees another, at most -100 where not.

    Returns:
        (S, N), int32.
    """
    return (mask == 0).int().argmax(-1).int()


def are_segments(mask: Tensor, segments: Tensor) -> Tensor:
    """Whether :func:`segments_of` says all that a mask does, a tensor of one truth value."""
    seen = mask == 0
    same = segments[:, :, None] == segments[:, None, :]
    return ((seen == same) & (seen | (mask <= HIDDEN))).all()


def checked_segments(mask: Tensor) -> Tensor | None:
    """:func:`segments_of`; None where the mask is another one, or wants a gradient.

    That is known without waiting for the device on the CPU alone, outside a compiled graph; elsewhere such a mask is an
    error when the device comes to it.
    """
    if mask.requires_grad:
        return None
    segments = segments_of(mask)
    if mask.is_meta:
        return segments
    valid = are_segments(mask, segments)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        return segments if valid else None
    torch._assert_async(
        valid, "attention_mask must be 0 within parts of a window and at most -100 between them; else restore the model"
    )
    return segments


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, size: Sequence[int], segments: Tensor | None,
    scale: float, dropout_p: float,
) -> Tensor:  # fmt: skip
    """Swin's attention of windows.

    Args:
        query, key, value: (B, N, heads, d), N = h * w.
        table: (heads, 2h-1, 2w-1).
        size: (h, w).
        segments: (S, N) or None.

    Returns:
        (B, N, heads * d).
    """
    grid = (int(size[0]), int(size[1]))
    query, key, value = (x.unflatten(1, grid).permute(0, 3, 1, 2, 4) for x in (query, key, value))
    if segments is not None:
        segments = segments.unflatten(1, grid)
    out = bias_attention_2d(
        query, key, value, table,
        query_segments=segments, key_segments=segments, scale=scale, dropout_p=dropout_p,
    )  # fmt: skip
    return joined_heads(out).flatten(1, 2)


def table_by_heads(table: Tensor, size: Sequence[int]) -> Tensor:
    """Swin's table (positions, heads) as the op takes it, a view (heads, 2h-1, 2w-1)."""
    return table.unflatten(0, (2 * int(size[0]) - 1, 2 * int(size[1]) - 1)).permute(2, 0, 1)


def unusual_index(index: Tensor, size: Sequence[int]) -> str | None:
    """Why a buffer of Swin's does not say where in the table the bias of a pair of positions lies."""
    h, w = (int(length) for length in size)
    if index.numel() != (h * w) ** 2:
        return f"relative_position_index does not fit the window of {h}x{w}"
    if index.is_meta:
        return None  # what is loaded into a buffer that a state dict has is not seen
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    y, x = y.flatten(), x.flatten()
    expected = (y[:, None] - y + h - 1) * (2 * w - 1) + x[:, None] - x + w - 1
    if not torch.equal(index.flatten().cpu().long(), expected.flatten()):
        return "relative_position_index is not that of a window in row-major order"
    return None


# --- squeeze_excite ---------------------------------------------------------------------------------------------------

_TORCH, _TIMM = "torch.nn.modules.activation:", "timm.layers.activations:"
HIDDEN_ACTIVATIONS = {
    f"{_TORCH}ReLU": "relu",
    f"{_TORCH}SiLU": "silu",
    f"{_TORCH}GELU": "gelu",
    f"{_TORCH}Hardswish": "hardswish",
    f"{_TIMM}Swish": "silu",
    f"{_TIMM}GELU": "gelu",
    f"{_TIMM}HardSwish": "hardswish",
}
GATES = {
    f"{_TORCH}Sigmoid": "sigmoid",
    f"{_TORCH}Hardsigmoid": "hardsigmoid",
    f"{_TIMM}Sigmoid": "sigmoid",
    f"{_TIMM}HardSigmoid": "hardsigmoid",
}


def scaled_map(x: Tensor, fc1: nn.Conv2d, activation: nn.Module, fc2: nn.Conv2d, gate: nn.Module) -> Tensor:
    """Squeeze-excite of a map (B, C, H, W) whose layers are 1x1 convolutions."""
    return squeeze_excite(
        x,
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        hidden_activation=HIDDEN_ACTIVATIONS[class_path(type(activation))],
        gate=GATES[class_path(type(gate))],
    )


def unusual_gates(module: nn.Module, *names: str) -> str | None:
    """Why the op does not compute the gates of a squeeze-excite layer, by the names of its submodules in their order:
    convolution, activation, convolution, gate; or convolution, gate; or without a gate, which is none."""
    convolutions, functions = names[::2], names[1::2]
    for name in convolutions:
        layer = module.get_submodule(name)
        if type(layer) is not nn.Conv2d:
            return f"{name} is a {type(layer).__name__}, not a 1x1 convolution"
        if layer.kernel_size != (1, 1) or layer.stride != (1, 1) or layer.groups != 1:
            return f"{name} is not a 1x1 convolution"
        if layer.padding not in ("same", "valid", (0, 0)):
            return f"{name} pads"
    for name in reversed(functions):
        what, known = ("gate", GATES) if name == names[-1] else ("hidden activation", HIDDEN_ACTIVATIONS)
        function = module.get_submodule(name)
        if class_path(type(function)) not in known or getattr(function, "approximate", "none") != "none":
            return f"{what} {function} is not computed"
    return has_hooks(module, *names)
