"""``attn_implementation="fused_attn"`` in transformers, whose own hooks do not reach attention of SAM's kind."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .convert import convert_modules, restore_modules
from .host import release
from .transformers_hosts import HOSTS, VERSIONS, wants_attentions

NAME = "fused_attn"
OPS = ("rel_attention_2d", "bias_attention_2d")
#: files of models that hold attention which the ops compute
_FILES = frozenset(path.split(":")[0] for path, host in HOSTS.items() if host.op in OPS)


def register() -> None:
    """Make ``attn_implementation="fused_attn"`` known to transformers, when a model is built and afterwards.

    It is then what :func:`~fused_attn.integrations.convert` does with a model's attention, strictly: a model without
    attention that an op computes, or of which one layer cannot be served, is a ``ValueError``; so is a part of a model,
    a language model say, for which ``attn_implementation={"vision_config": "fused_attn"}`` asks only where it applies.
    Attention of another kind in the same model, such as that of SAM's mask decoder, runs SDPA.  Going back with
    ``set_attn_implementation`` restores the layers, of the class that the model was built with.

    A second call changes nothing.

    Raises:
        ImportError: transformers is not installed, or its version is not one that is known.
    """
    import transformers

    if not release(VERSIONS[0]) <= release(transformers.__version__) < release(VERSIONS[1]):
        raise ImportError(
            f"register needs transformers from {VERSIONS[0]} to below {VERSIONS[1]}, found {transformers.__version__}"
        )
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel

    if getattr(PreTrainedModel.post_init, "registered", None) == NAME:
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    methods = {
        "get_correct_attn_implementation": _get_correct_attn_implementation,
        "post_init": _post_init,
        "set_attn_implementation": _set_attn_implementation,
        "_can_set_attn_implementation": _can_set,
    }
    for name, method in methods.items():
        setattr(PreTrainedModel, name, _around(PreTrainedModel.__dict__[name], method))


def _around(original: Any, method: Any) -> Any:
    """``method(original, self, ...)`` in the place of a method or class method."""
    function = original.__func__ if isinstance(original, classmethod) else original

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return method(function, *args, **kwargs)

    wrapper.registered = NAME  # type: ignore[attr-defined]
    return classmethod(wrapper) if isinstance(original, classmethod) else wrapper


def _file(kind: type) -> str | None:
    """The file of a model's class that holds attention which the ops compute."""
    return next((each.__module__ for each in kind.__mro__ if each.__module__ in _FILES), None)


def _get_correct_attn_implementation(
    original: Any, self: Any, requested_attention: str | None, is_init_check: bool = False
) -> str:
    """Refuses models that hold nothing to compute; lets the others find a class to build."""
    if requested_attention == NAME:
        file = _file(type(self))
        if file is None:
            raise ValueError(
                f'attn_implementation="{NAME}" must be asked for models whose attention it computes, got '
                f"{type(self).__name__}; for a part of a model name it: "
                f'attn_implementation={{"vision_config": "{NAME}"}}'
            )
        for name, table in vars(sys.modules[file]).items():
            if name.endswith("_VISION_ATTENTION_CLASSES"):
                table.setdefault(NAME, table["eager"])  # which returns attention weights where they are asked for
    return original(self, requested_attention, is_init_check)


def _post_init(original: Any, self: Any) -> None:
    original(self)
    convert_modules(dict(_governed(self)), OPS, strict=True)


def _set_attn_implementation(original: Any, self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    models = [module for module in self.modules() if _is_model(module)]
    configs = {id(model.config): model.config for model in models}
    before = {key: config._attn_implementation for key, config in configs.items()}
    fused = dict(_governed(self))
    try:
        asked = NAME in str(attn_implementation)
        with _made_settable() if asked or NAME in before.values() else contextlib.nullcontext():
            original(self, attn_implementation, *args, **kwargs)
        governed = dict(_governed(self))
        report = convert_modules(governed, OPS, strict=True)
        if asked and not len(report):
            raise ValueError(f'attn_implementation="{NAME}" finds no attention that it computes in this model')
    except Exception:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        raise
    restore_modules(module for path, module in fused.items() if path not in governed)


_settable = False


@contextlib.contextmanager
def _made_settable() -> Iterator[None]:
    """Within it, transformers sets the implementation of models too that do not use its interface."""
    global _settable
    _settable = True
    try:
        yield
    finally:
        _settable = False


def _can_set(original: Any, cls: type) -> bool:
    return (_settable and _file(cls) is not None) or original(cls)


def _is_model(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "_attn_implementation") and hasattr(module, "post_init")


def _governed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose nearest model is set to ``"fused_attn"``, by path."""
    stack = [("", model, False)]
    while stack:
        path, module, fused = stack.pop()
        if _is_model(module):
            fused = module.config._attn_implementation == NAME  # type: ignore[union-attr]
        if fused:
            yield path, module
        children = [(f"{path}.{name}".lstrip("."), child, fused) for name, child in module.named_children()]
        stack += reversed(children)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Attention that no op computes, or of which the weights are asked for."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is not None and wants_attentions(module, kwargs.get("output_attentions")):
        return eager(module, query, key, value, attention_mask, **kwargs)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
