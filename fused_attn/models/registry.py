"""Names of models.  A name stands for a class, and may set other defaults for some of its options."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..ops._floor import checks
from ..ops._floor.dispatch import IMPLEMENTATIONS
from .weights import load_weights


@dataclass(frozen=True)
class _Family:
    pattern: re.Pattern[str]
    build: Callable[..., nn.Module]
    defaults: Mapping[str, Any]
    names: tuple[str, ...]


_FAMILIES: list[_Family] = []


def register_model(
    pattern: str, build: Callable[..., nn.Module], *, names: Iterable[str] = (), **defaults: Any
) -> None:
    """Register a model, or a family of models with numbers in their names.

    Args:
        pattern: regular expression of the whole name.  Its groups match numbers, which ``build`` gets as its
            positional arguments: ``r"wrn_(\\d+)_(\\d+)"``.
        build: makes the model; its keyword-only arguments are the options that users may set.
        names: the names that :func:`list_models` shows; ``pattern`` itself when there are none.
        defaults: options that distinguish this name from others that share ``build``.

    Raises:
        ValueError: a name is taken, or does not match ``pattern``.
    """
    family = _Family(re.compile(pattern), build, defaults, tuple(names) or (pattern,))
    for name in family.names:
        if not family.pattern.fullmatch(name):
            raise ValueError(f"names must match pattern {pattern!r}, got {name!r}")
        if _find(name) is not None:
            raise ValueError(f"the model name {name!r} is already registered")
    _FAMILIES.append(family)


def list_models(pattern: str = "*") -> list[str]:
    """List the names of registered models that match a shell-style pattern, sorted by family and number.

    Families take more numbers than are listed: ``wrn_22_3`` exists too.
    """
    names = (name for family in _FAMILIES for name in family.names)
    return sorted(fnmatch.filter(names, pattern), key=_natural)


def create_model(
    name: str,
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    impl: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model by its name, with fresh weights or those of a file.

    Args:
        name: one of :func:`list_models`, or another member of those families.
        num_classes: outputs of the classifier.
        in_chans: channels of the input images.
        impl: implementation of the package's ops in the model; no influence on models that have none of them.
        checkpoint: a file of weights, ``.safetensors`` or ``.pth``, of this package or of another implementation whose
            names are known: torchvision's and timm's ResNet, timm's DeiT and Swin, the MRLA authors' ResNet and DeiT;
            see :func:`load_weights`.  ``num_classes`` is to be the file's.  Tables of positions of another image size,
            or of another ``window`` of Swin, are interpolated as by :func:`~fused_attn.modules.resize_state_dict`, and
            a ``UserWarning`` names each.
        checkpoint_size: the ``image_size`` of ``checkpoint``, where its maps are not square and not the model's.
        options: the keyword arguments of the model's class, such as ``attention_stages``, ``relative``, ``drop_path``,
            ``features_only``.  ``image_size`` has no influence on models that take images of any size.

    Returns:
        The model: (B, in_chans, H, W) -> (B, num_classes) logits, or a list of maps with ``features_only=True``.

    Raises:
        ValueError: the name is unknown, an option's value is out of range, the weights in ``checkpoint`` do not fit, or
            there is a ``checkpoint_size`` without it.
        TypeError: the model has no such option.
        FileNotFoundError: there is no file ``checkpoint``.
    """
    family = _find(name)
    if family is None:
        close = difflib.get_close_matches(name, list_models(), n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "list_models() names them all"
        raise ValueError(f"name must be a registered model, got {name!r}: {hint}")
    checks.positive(num_classes=num_classes, in_chans=in_chans)
    checks.one_of("impl", impl, IMPLEMENTATIONS)

    parameters = inspect.signature(family.build).parameters.values()
    accepted = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    if "image_size" not in accepted:
        options.pop("image_size", None)
    unknown = sorted(options.keys() - accepted)
    if unknown:
        public = ", ".join(sorted(accepted - {"num_classes", "in_chans", "impl"}))
        raise TypeError(f"{name} has no option {', '.join(map(repr, unknown))}; its options are {public}")
    if checkpoint_size is not None and checkpoint is None:
        raise ValueError(f"checkpoint_size must be None without checkpoint, got {checkpoint_size}")
    if "impl" in accepted:
        options["impl"] = impl
    numbers = [*map(int, family.pattern.fullmatch(name).groups())]  # type: ignore[union-attr]  # _find has matched it
    build = partial(family.build, *numbers, num_classes=num_classes, in_chans=in_chans, **family.defaults)
    model = build(**options)
    if checkpoint is not None:
        unused: set[str] = set()
        if options.get("features_only"):  # the file's classifier, and stages past the last map
            with torch.device("meta"):
                whole = build(**{**options, "features_only": False, "out_indices": None})
            unused = whole.state_dict().keys() - model.state_dict().keys()
        source = None
        if checkpoint_size is not None and "image_size" in accepted:
            with torch.device("meta"):
                source = build(**{**options, "image_size": checkpoint_size})
        load_weights(model, checkpoint, unused, resize=True, source=source)
    return model


def _find(name: str) -> _Family | None:
    return next((family for family in _FAMILIES if family.pattern.fullmatch(name)), None)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key by which wrn_10_1 precedes wrn_28_10 and numbers precede letters."""
    parts = re.findall(r"\d+|\D+", name)
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
