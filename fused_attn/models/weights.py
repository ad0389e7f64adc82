"""Published weights: files of other implementations, by the names that their networks give to what ours holds."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..ops._floor.positions import other_sizes, resize_state_dict

Rule = tuple[str, "str | Callable[[re.Match[str]], str]"]


def _stage(match: re.Match[str]) -> str:
    """``layer1.0.`` or ``block1.layer.0.`` -> ``stages.0.0.``"""
    return f"stages.{int(match[1]) - 1}.{match[2]}."


_MRLA: tuple[Rule, ...] = (
    (r"\.mrla\.mrla\.W([qkv])\.", lambda m: f".mrla.{ {'q': 'query', 'k': 'key', 'v': 'value'}[m[1]] }."),
    (r"\.mrla\.lambda_t$", ".mrla.shortcut_weight"),
)

_IMAGENET_RESNET = "ResNet of torchvision, timm and the MRLA authors"
#: Whose names -> what they are called here; every rule is applied to every name, in this order.
SCHEMES: Mapping[str, tuple[Rule, ...]] = {
    "this package": (),
    _IMAGENET_RESNET: (
        (r"^conv1\.", "stem."), (r"^bn1\.", "bn."), (r"^layer(\d+)\.(\d+)\.", _stage),
        (r"\.downsample\.", ".shortcut."), *_MRLA,
    ),
    "Wide ResNet of the common PyTorch implementation": (
        (r"^conv1\.", "stem."), (r"^bn1\.", "bn."), (r"^block(\d+)\.layer\.(\d+)\.", _stage),
        (r"\.convShortcut\.", ".shortcut."),
    ),
    "DeiT of timm and the MRLA authors": (
        (r"^patch_embed\.proj\.", "patches."), (r"^cls_token$", "class_token"), (r"^pos_embed$", "positions"),
        (r"\.attn\.", ".attention."), (r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.2."),
        (r"\.mrla\.normx\.", ".norm_mrla."), (r"\.mrla\.normo\.", ".norm_shortcut."), *_MRLA,
    ),
    "Swin of timm": ((r"^head\.fc\.", "head."),),
    "Swin of its authors": ((r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample."),),
}  # fmt: skip

#: Under which the state dict lies in a file that holds more.
_CONTAINERS = ("state_dict", "model", "model_state_dict")
#: Ends of the names of buffers that a network computes from its sizes.
_COMPUTED = ("relative_position_index", "attn_mask")


def load_weights(
    model: nn.Module,
    file: str | os.PathLike[str],
    unused: Collection[str] = (),
    *,
    resize: bool = False,
    source: nn.Module | None = None,
) -> str:
    """Load a published file of weights into a model, in place; all of it, or nothing.

    Args:
        model: one of this package's, with the classifier of the file and, without ``resize``, its image size.
        unused: names, as the model's whole form has them, that the file may hold and the model does not.
        file: ``.safetensors``, or what ``torch.save`` wrote, which is read with ``weights_only=True``: a state dict, or
            a dictionary that holds one as ``"state_dict"``, ``"model"`` or ``"model_state_dict"``.  A leading
            ``module.`` of ``DistributedDataParallel`` is dropped.
        resize: whether tables of positions of another size are interpolated, as by
            :func:`~fused_attn.modules.resize_state_dict`; a ``UserWarning`` then names each.
        source: a model like ``model`` with the image size of the file, on the meta device or not, where its maps are
            not square; needs ``resize``.

    Returns:
        Whose names the file used: a key of ``SCHEMES``.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a ``.safetensors`` file without the package safetensors.
        ValueError: the file holds something else than weights, or weights that do not fit, each of which is named, or
            that are not finite; or the model is on meta.
    """
    if source is not None and not resize:
        raise ValueError("source must be None without resize=True, got a model")
    path = Path(file)
    weights = _read(path)
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError("model must hold memory to load weights into, got one on meta")
    renamed = {scheme: _renamed(weights, rules) for scheme, rules in SCHEMES.items()}
    whole = own.keys() | set(unused)
    scheme = min(renamed, key=lambda each: len(renamed[each].keys() ^ whole))
    if scheme == _IMAGENET_RESNET and getattr(getattr(model, "stem", None), "stride", None) == (1, 1):
        raise ValueError(f"{path} holds the weights of a ResNet whose first convolution has stride 2: stem='imagenet'")
    found = {name: _in_shape(tensor, own.get(name)) for name, tensor in renamed[scheme].items() if name not in unused}
    # Files older than this counter lack it.
    counters = {name: own[name] for name in own.keys() - found.keys() if name.endswith("num_batches_tracked")}
    resized: list[str] = []
    problems: list[str] = []
    if resize:
        try:
            found, resized = resize_state_dict(model, found, source=source)
        except ValueError as error:
            problems = [str(error)]
    elif names := other_sizes(model, found):
        problems = [f"resize=True would interpolate {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"]
    if problems := [*problems, *_problems({**found, **counters}, own)]:
        shown, more = problems[:12], len(problems) - 12
        rest = f"; and {more} more" if more > 0 else ""
        raise ValueError(f"{path} must hold the weights of this {type(model).__name__}: {'; '.join(shown)}{rest}")
    model.load_state_dict({**found, **counters})
    if resized:
        warnings.warn(f"weights of {path} resized: {'; '.join(resized)}", stacklevel=2)
    return scheme


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must be a file, found none at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors to be read: pip install safetensors") from error
    except Exception as error:  # of the unpickler, of the archive, of safetensors
        raise ValueError(f"{path} must hold weights and nothing else: {str(error).splitlines()[0]}") from error
    for container in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
            break
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold a state dict, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path} must hold a state dict, got {type(value).__name__} under {name!r}")
        if not isinstance(name, str) or value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ValueError(f"{path} must hold dense tensors by their names, got another kind under {name!r}")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return {name: value for name, value in content.items() if not name.endswith(_COMPUTED)}


def _renamed(weights: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        own_name = name
        for pattern, replacement in rules:
            own_name = re.sub(pattern, replacement, own_name)
        renamed[f"{name}, a second {own_name}," if own_name in renamed else own_name] = tensor
    return renamed


def _in_shape(tensor: Tensor, own: Tensor | None) -> Tensor:
    """The tensor in the shape of ours, where they differ in dimensions of size 1 alone."""
    if own is None or [n for n in tensor.shape if n != 1] != [n for n in own.shape if n != 1]:
        return tensor
    return tensor.reshape(own.shape)


def _problems(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{name} is missing" for name in own if name not in found]
    for name, tensor in found.items():
        if name not in own:
            problems.append(f"{name} is not in the model")
        elif tensor.shape != own[name].shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, {tuple(own[name].shape)} expected")
        elif tensor.is_floating_point() != own[name].is_floating_point():
            problems.append(f"{name} has dtype {tensor.dtype}, {own[name].dtype} expected")
        elif tensor.is_floating_point() and not tensor.to(own[name].dtype).isfinite().all():
            problems.append(f"{name} holds inf or nan, or numbers past {own[name].dtype}")
    return problems
