"""Parameters that belong to positions of a map: how they are interpolated for maps of another size, and state dicts."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks

BIAS_METHODS = ("bicubic", "geometric")


@dataclass(frozen=True)
class Positions:
    """Where the positions of a table lie, and how it is interpolated for others.

    Args:
        size: (H,) or (H, W), that of the maps which the table is for.
        axis: of the table; positions follow one another along it, row by row.
        mode: of ``torch.nn.functional.interpolate``, with ``align_corners=False``.
        relative: whether the positions are relative, 2 * H - 1 of them along H.
        antialias: whether the interpolation is low-pass filtered.
        prefix: entries before the positions, which are kept as they are.
    """

    size: tuple[int, ...]
    axis: int
    mode: str
    relative: bool = True
    antialias: bool = False
    prefix: int = 0

    @property
    def method(self) -> str:
        return f"{self.mode} with antialiasing" if self.antialias else self.mode

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Positions along each axis of a map."""
        return tuple(2 * length - 1 if self.relative else length for length in size)

    def resized(self, table: Tensor, size: tuple[int, ...]) -> Tensor:
        """The table for maps of ``size``, in its dtype; computed in float32 or, from float64, in float64.

        A table of that size is returned itself.  Gradients reach ``table``; on CUDA PyTorch adds them up in no fixed
        order.
        """
        old, new = self.grid(self.size), self.grid(size)
        if old == new:
            return table
        moved = table.movedim(self.axis, -1)
        kept, values = moved[..., : self.prefix], moved[..., self.prefix :]
        values = values.reshape(1, -1, *old).to(torch.promote_types(table.dtype, torch.float32))
        if self.mode == "geometric":
            rows, columns = (_geometric(*lengths).to(table.device) for lengths in zip(old, new, strict=True))
            values = rows @ values.double() @ columns.T
        else:
            values = F.interpolate(values, size=new, mode=self.mode, antialias=self.antialias)
        values = values.to(table.dtype).reshape(*moved.shape[:-1], -1)
        return (torch.cat((kept, values), -1) if self.prefix else values).movedim(-1, self.axis)

    @property
    def square(self) -> str:
        """The number of entries of a table for a square map of H positions a side."""
        side = "2 * H - 1" if self.relative else "H"
        number = side if len(self.size) == 1 else f"({side})**2" if self.relative else f"{side}**2"
        return f"{self.prefix} + {number}" if self.prefix else number

    def size_of(self, table: Tensor) -> tuple[int, ...] | None:
        """Size of the maps that another table of this kind is for, which are square; None: there is no such size."""
        positions = table.shape[self.axis] - self.prefix
        length = positions if len(self.size) == 1 else math.isqrt(max(positions, 0))
        if length < 1 or length ** len(self.size) != positions or (self.relative and length % 2 == 0):
            return None
        return ((length + 1) // 2 if self.relative else length,) * len(self.size)


def _geometric(old: int, new: int) -> Tensor:
    """Weights (new, old), float64, of a linear interpolation between samples whose distances grow outwards.

    They grow by a factor of 1.01 to 1.5 that takes the outermost samples to the outermost of the new positions.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        factor = (low + high) / 2
        low, high = (low, factor) if sum(factor**step for step in range(old // 2)) > new // 2 else (factor, high)
    outward = torch.tensor([factor**step for step in range(old // 2)], dtype=torch.float64).cumsum(0)
    samples = torch.cat((-outward.flip(0), outward.new_zeros(1), outward))
    targets = (torch.arange(new, dtype=torch.float64) - new // 2).clamp(samples[0], samples[-1])
    right = torch.searchsorted(samples, targets).clamp(min=min(1, old - 1))
    left = (right - 1).clamp(min=0)
    share = ((targets - samples[left]) / (samples[right] - samples[left])).nan_to_num(0.0)  # a single sample: 0 / 0
    weights = torch.zeros(new, old, dtype=torch.float64)
    weights.scatter_add_(1, left[:, None], 1 - share[:, None])
    return weights.scatter_add_(1, right[:, None], share[:, None])


class PositionTables(nn.Module):
    """A module with parameters that belong to positions."""

    resize_tables = False

    def position_tables(self) -> dict[str, Positions]:
        """What there is to know of each, by its name."""
        raise NotImplementedError  # every module has its own

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        for name, positions in self.position_tables().items():
            table, own = state_dict.get(prefix + name), getattr(self, name)
            if _is_alike(table, own, positions.axis) and table.shape != own.shape:
                lists[-1].append(
                    f"{prefix}{name} is for maps of another size: fused_attn.modules.resize_state_dict(module, "
                    "state_dict) returns a state dict that loads."
                )


def resize_state_dict(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    source: nn.Module | None = None,
    bias_method: str = "bicubic",
) -> tuple[dict[str, Tensor], list[str]]:
    """Resize the tables of positions in a state dict to those of a module, to load it into that module.

    Each kind of table is interpolated as in the code that made it common:

    - relative embeddings, (2H-1, d) and (2W-1, d): linearly along the positions, as in SAM, ViTDet and MViTv2;
    - biases of windows, ((2h-1) * (2w-1), heads): bicubic, as in Swin's code; or ``"geometric"``, as in BEiT's and
      timm's ``resize_rel_pos_bias_table``: linear between samples whose distances grow geometrically outwards;
    - positions of a vision transformer, (1, 1 + H*W, dim): bicubic with antialiasing, as in timm's
      ``resample_abs_pos_embed``; the class token's is kept.  (transformers' has no antialiasing.)

    All with half-pixel centres, in float32 (float64 stays) and rounded to the table's dtype.  Everything else stays as
    it is, also what does not fit for another reason, which ``load_state_dict`` then refuses.  ``state_dict`` is not
    changed.

    Args:
        module: what is to load it: a module of this package, a network of it, or any module with some of them inside.
        state_dict: its state dict, but for the sizes.
        source: a module like ``module`` that has the sizes of ``state_dict``; the meta device will do.  Without it
            tables of the module's own shape are left alone, and others are taken for those of square maps where their
            shape does not tell.
        bias_method: ``"bicubic"`` or ``"geometric"``, for biases of windows.

    Returns:
        The new state dict, and a line for every table that was resized: its name, both sizes and the method.

    Raises:
        TypeError: ``module`` is no module or ``state_dict`` no mapping.
        ValueError: ``bias_method`` is unknown, a table has no such number of positions that they could be a square
            map's, or not those of ``source``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    checks.one_of("bias_method", bias_method, BIAS_METHODS)
    resized: dict[str, Tensor] = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        resized._metadata = state_dict._metadata  # type: ignore[attr-defined]  # versions of the modules, for loading
    sizes = None if source is None else {name: (table, own.size) for name, table, own in _tables(source)}
    lines = []
    for name, own_table, positions in _tables(module):
        table = state_dict.get(name)
        if not _is_alike(table, own_table, positions.axis):
            continue
        size: tuple[int, ...] | None
        if sizes is not None:
            like, size = sizes.get(name, (None, None))
            if like is None or like.shape != table.shape:
                was = "none" if like is None else f"one of shape {tuple(like.shape)}"
                raise ValueError(f"source must have {name} in the state dict's shape {tuple(table.shape)}, got {was}")
        else:
            size = positions.size if table.shape == own_table.shape else positions.size_of(table)
        if size is None:
            raise ValueError(
                f"{name} must hold {positions.square} entries, for a square map, got shape {tuple(table.shape)}; "
                "those of other maps need source, a module of their size (create_model: checkpoint_size)"
            )
        if size == positions.size:
            continue
        was_for = replace(positions, size=size)
        if bias_method == "geometric" and positions.relative and len(size) == 2:
            was_for = replace(was_for, mode="geometric")
        with torch.no_grad():
            resized[name] = was_for.resized(table, positions.size).contiguous()
        sides = ("x".join(map(str, each)) for each in (size, positions.size))
        lines.append(f"{name} from {next(sides)} to {next(sides)}, {was_for.method}")
    return resized, lines


def other_sizes(module: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Names of the tables in a state dict that differ from a module's in their number of positions alone."""
    return [
        name
        for name, own, positions in _tables(module)
        if _is_alike(table := state_dict.get(name), own, positions.axis) and table.shape != own.shape
    ]


def _tables(module: nn.Module) -> Iterator[tuple[str, Tensor, Positions]]:
    """Each under every name that it has in the state dict."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, PositionTables):
            for name, positions in part.position_tables().items():
                yield f"{prefix}.{name}".lstrip("."), getattr(part, name), positions


def _is_alike(table: object, own: Tensor, axis: int) -> TypeGuard[Tensor]:
    """Whether it is a table that may differ in its number of positions, and in nothing else."""
    if not isinstance(table, Tensor) or table.layout != torch.strided or table.dim() != own.dim():
        return False
    if not table.is_floating_point() or table.element_size() < 2:  # float8 has no arithmetic
        return False
    return all(n == m for i, (n, m) in enumerate(zip(table.shape, own.shape, strict=True)) if i != axis % own.dim())
