"""What PyTorch can do to a function, each as one call: (op, its inputs) -> tensors by name.

``outcome`` runs one on an implementation and says "works", where every tensor meets the contract's bar against the
reference in float64 under the same transform, or "error: " and the text.  Anything else is an AssertionError.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mask_checks
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_attn.ops import SPECS
from fused_attn.ops._floor.declarations import OpSpec, Sample, convert, differentiable, with_tensors
from fused_attn.testing.numerics import mismatches

#: A function of tensors by position; its tensors; the same values for every dtype.
Function = Callable[..., Tensor]
Transform = Callable[[Function, tuple[Tensor, ...]], dict[str, Tensor]]


def _like(tensor: Tensor, seed: int) -> Tensor:
    """Numbers in [-1, 1] without order, the same in every dtype up to rounding; no generator, which vmap refuses."""
    phases = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
    return (1.7 * phases.square() + seed).sin().view(tensor.shape).to(tensor.dtype)


def _tangents(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(_like(value, 10 + i) for i, value in enumerate(values))


def _named(tensors, prefix: str) -> dict[str, Tensor]:
    tensors = tensors if isinstance(tensors, (tuple, list)) else (tensors,)
    return {f"{prefix}_{i}": tensor for i, tensor in enumerate(tensors)}


def _loss(function: Function) -> Function:
    """A number that depends on every element of the output, not linearly."""

    def loss(*values: Tensor) -> Tensor:
        out = function(*values)
        return (out * _like(out, 1)).sum() + out.square().sum()

    return loss


def _all(values) -> tuple[int, ...]:
    return tuple(range(len(values)))


def _leaves(values: tuple[Tensor, ...]) -> list[Tensor]:
    return [value.detach().clone().requires_grad_() for value in values]


def jvp(function, values):
    out, tangent = torch.func.jvp(function, values, _tangents(values))
    return {"out": out, "tangent": tangent}


def jvp_of_one(function, values):
    """Forward mode in the first argument alone: the others carry no tangent."""
    return {"tangent": torch.func.jvp(lambda first: function(first, *values[1:]), values[:1], _tangents(values[:1]))[1]}


def dual_numbers(function, values):
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(function(*map(forward_ad.make_dual, values, _tangents(values))))
        return {"out": out.primal, "tangent": out.tangent}


def jacfwd(function, values):
    return _named(torch.func.jacfwd(function, argnums=_all(values))(*values), "jacobian")


def linearize(function, values):
    out, push = torch.func.linearize(function, *values)
    return {"out": out, "tangent": push(*_tangents(values))}


def compiled_jvp(function, values):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: torch.func.jvp(function, args, _tangents(args)), fullgraph=True, backend="aot_eager"
    )
    out, tangent = compiled(*values)
    return {"out": out, "tangent": tangent}


def compiled_dual_numbers(function, values):
    torch._dynamo.reset()
    return torch.compile(lambda *args: dual_numbers(function, args), backend="aot_eager")(*values)


def vjp(function, values):
    out, pull = torch.func.vjp(function, *values)
    return {"out": out, **_named(pull(_like(out, 2)), "grad")}


def func_grad(function, values):
    return _named(torch.func.grad(_loss(function), argnums=_all(values))(*values), "grad")


def jacrev(function, values):
    return _named(torch.func.jacrev(function, argnums=_all(values))(*values), "jacobian")


def vmap(function, values):
    stacked = [torch.stack((value, value + 0.5 * _like(value, 3))) for value in values]
    return {"out": torch.vmap(function)(*stacked)}


def gradient_per_sample(function, values):
    stacked = [torch.stack((value, value + 0.5 * _like(value, 3))) for value in values]
    return _named(torch.vmap(torch.func.grad(_loss(function), argnums=_all(values)))(*stacked), "grad")


def double_backward(function, values):
    leaves = _leaves(values)
    grads = torch.autograd.grad(_loss(function)(*leaves), leaves, create_graph=True)
    return _named(torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves), "grad")


def grad_of_grad(function, values):
    def norm(*args):
        grads = torch.func.grad(_loss(function), argnums=_all(values))(*args)
        return sum(grad.square().sum() for grad in grads)

    return _named(torch.func.grad(norm, argnums=_all(values))(*values), "grad")


def jvp_of_grad(function, values):
    """A Hessian-vector product, forward over reverse."""
    gradient = torch.func.grad(_loss(function), argnums=_all(values))
    return _named(torch.func.jvp(gradient, values, _tangents(values))[1], "hvp")


def grad_of_jvp(function, values):
    """Reverse over forward."""

    def derivative(*args):
        return torch.func.jvp(_loss(function), args, _tangents(args))[1]

    return _named(torch.func.grad(derivative, argnums=_all(values))(*values), "hvp")


def hessian(function, values):
    return _named(torch.func.hessian(_loss(function))(*values), "hessian")


def _checkpointed(use_reentrant: bool) -> Transform:
    def transform(function, values):
        leaves = _leaves(values)
        out = checkpoint(function, *leaves, use_reentrant=use_reentrant)
        return {"out": out.detach(), **_named(torch.autograd.grad(_loss(lambda: out)(), leaves), "grad")}

    # The reentrant kind takes backward() alone.
    def reentrant(function, values):
        leaves = _leaves(values)
        out = checkpoint(function, *leaves, use_reentrant=True)
        _loss(lambda: out)().backward()
        return {"out": out.detach(), **_named([leaf.grad for leaf in leaves], "grad")}

    return reentrant if use_reentrant else transform


class _Module(nn.Module):
    """The op with every tensor of the call as a parameter."""

    def __init__(self, function: Function, values: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([value.detach().clone() for value in values])

    def forward(self) -> Tensor:
        return self.function(*self.weights)


def hooks(function, values):
    """Hooks on every parameter see the gradient that is accumulated, once, and may replace it."""
    module, seen = _Module(function, values), {}
    for i, weight in enumerate(module.weights):
        weight.register_hook(lambda grad, i=i: seen.setdefault(f"hooked_{i}", []).append(grad) or 2 * grad)
        weight.register_post_accumulate_grad_hook(
            lambda weight, i=i: seen.setdefault(f"accumulated_{i}", []).append(weight.grad)
        )
    _loss(module)().backward()
    assert all(len(grads) == 1 for grads in seen.values()), "a hook ran more than once"
    return {name: grads[0] for name, grads in seen.items()}


def deepcopy(function, values):
    """A copy computes the same on its own parameters, and leaves the gradients of the original alone."""
    module = _Module(function, values)
    _loss(module)().backward()
    before = [weight.grad.clone() for weight in module.weights]
    twin = copy.deepcopy(module)
    twin.zero_grad()
    _loss(twin)().backward()
    assert all(map(torch.equal, before, (weight.grad for weight in module.weights))), "the original's gradients changed"
    return _named([weight.grad for weight in twin.weights], "grad")


def _autocast(dtype: torch.dtype) -> Transform:
    def transform(function, values):
        leaves = _leaves(values)
        # float64 stays as it is, in every op: the oracle.
        with torch.autocast(values[0].device.type, dtype=dtype):
            out = function(*leaves)
        grads = torch.autograd.grad(_loss(lambda: out)(), leaves)
        if values[0].dtype != torch.float64:  # their errors are those of the lower precision
            grads = [grad.to(dtype) for grad in grads]
        return {"out": out.detach(), **_named(grads, "grad")}

    return transform


TRANSFORMS: Mapping[str, Transform] = {
    "torch.func.jvp": jvp,
    "torch.func.jvp, one argument": jvp_of_one,
    "forward_ad dual numbers": dual_numbers,
    "torch.func.jacfwd": jacfwd,
    "torch.func.linearize": linearize,
    "jvp in torch.compile": compiled_jvp,
    "dual numbers in torch.compile": compiled_dual_numbers,
    "torch.func.vjp": vjp,
    "torch.func.grad": func_grad,
    "torch.func.jacrev": jacrev,
    "torch.func.vmap": vmap,
    "vmap of grad": gradient_per_sample,
    "double backward": double_backward,
    "grad of grad": grad_of_grad,
    "jvp of grad": jvp_of_grad,
    "grad of jvp": grad_of_jvp,
    "torch.func.hessian": hessian,
    "checkpoint, reentrant": _checkpointed(True),
    "checkpoint, not reentrant": _checkpointed(False),
    "hooks on every parameter": hooks,
    "deepcopy": deepcopy,
    "autocast float16": _autocast(torch.float16),
    "autocast bfloat16": _autocast(torch.bfloat16),
}


#: Rows of the grid that are no transforms: masks among the logits of the ops that take some.
MASKED = {f"mask of {mask}": mask for mask in mask_checks.MASKS}
ROWS = (*TRANSFORMS, *MASKED)
NO_MASK = "no mask"

#: Those that compile take seconds, and so do all in the interpreter: one draw is enough.
SLOW = ("jvp in torch.compile", "dual numbers in torch.compile")
#: Those that compile or trace, and what gives the same numbers without either: the bar is the reference under that.
EAGER = {
    "torch.func.linearize": "torch.func.jvp",
    "jvp in torch.compile": "torch.func.jvp",
    "dual numbers in torch.compile": "forward_ad dual numbers",
}

#: What the reference gives in float32 and float64, by op, sample and transform: the same for every implementation.
_BARS: dict[tuple[str, str, str], list[dict[str, Tensor]]] = {}


def outcome(spec: OpSpec, impl: str, sample: Sample, name: str) -> str:
    """``"works"``, or ``"error: "`` and the first line of the text, or ``NO_MASK``.

    Raises:
        AssertionError: a tensor misses the contract's bar, or is missing.
    """
    if name in MASKED:
        return _outcome_of_mask(spec, impl, MASKED[name])
    draws = 1 if name in SLOW or os.environ.get("TRITON_INTERPRET") == "1" else 3
    try:
        actual = _run(spec, impl, sample, name, torch.float32, draws)
    except AssertionError:
        raise
    except Exception as error:
        text = str(error).strip()
        if not text:
            raise AssertionError(f"an error without a text: {error!r}") from error
        return f"error: {_neutral(text.splitlines()[0])}"
    bar = spec.name, sample.name, name
    if bar not in _BARS:
        eager = EAGER.get(name, name)
        _BARS[bar] = [_run(spec, "reference", sample, eager, dtype, draws) for dtype in (torch.float32, torch.float64)]
    found = mismatches(actual, *_BARS[bar])
    assert not found, "; ".join(found)
    return "works"


def _run(spec: OpSpec, impl: str, sample: Sample, name: str, dtype: torch.dtype, draws: int) -> dict[str, Tensor]:
    results = [TRANSFORMS[name](*call_of(spec, impl, sample, dtype, draw)) for draw in range(draws)]
    missing = [key for key, tensor in results[0].items() if tensor is None]
    assert not missing, f"nothing came for {', '.join(missing)}"
    return {key: torch.stack([result[key].detach() for result in results]) for key in results[0]}


def _outcome_of_mask(spec: OpSpec, impl: str, mask: str) -> str:
    cases = [
        case
        for case in (*mask_checks.bias_cases(("small",)), *mask_checks.OTHER_CASES)
        if case.op == spec.name and (mask, mask) in case.masks
    ]
    if not cases:
        return NO_MASK
    found = [f"{case.id}: {text}" for case in cases for text in replace(case, masks=((mask, mask),)).mismatches(impl)]
    assert not found, "; ".join(found)
    return "works"


def _neutral(text: str) -> str:
    """The text without the names of one op: the same error of two ops is one line of the page."""
    text = re.sub(r"fused_attn::\w+", "fused_attn::OP", text)
    return re.sub(r"^[\w, ]+: the fused", "OP: the fused", text)


def call_of(spec: OpSpec, impl: str, sample: Sample, dtype: torch.dtype, draw: int):
    """The op as a function of its tensors, and the tensors."""
    call = convert(sample.inputs(torch.float32, draw=draw), dtype)
    names, values = zip(*differentiable(call).items(), strict=True)

    def function(*args: Tensor) -> Tensor:
        return spec.function(**with_tensors(call, dict(zip(names, args, strict=True))), impl=impl)

    return function, values


def sample_of(spec: OpSpec) -> Sample:
    """A small call without dropout, whose mask the transforms of torch.func would draw anew."""
    return next(sample for sample in spec.samples if sample.small and not sample.inputs(torch.float32).get("dropout_p"))


# --- the published grid ---------------------------------------------------------------------------------------------

HEADER = """# What PyTorch can do to the ops

Each cell was run on a small call of the op in float32: **works** means that every output and gradient meets the bar of
the op contract against the reference in float64 under the same transform; a number stands for the error that is raised,
listed below. No cell is silent. `tests/test_transforms.py` runs them all; `python tests/transforms.py` writes the page.

Masks lie among the logits (biases, weights, the input itself), on rows, single keys and whole queries, in float32,
bfloat16 and, where float16 has the number, float16: as PyTorch's softmax has it in the same dtype. `no mask`: the op
has no logits that a caller sets, or the mask is tested through `row_col_softmax` alone.

Outputs and gradients come from the kernels. Tangents of forward mode and second derivatives (gradient penalties,
Hessian-vector products) come from the reference's formulas: right to the bar, at the reference's cost in time.
Attention computes them for some rows of queries at a time, so that no N x N map is held, unless they are to be
differentiated once more.

`torch.vmap` folds what it maps into the batch, or into heads or channels where parameters are mapped too or each
mapped call has gradients of its own (gradients per sample): one call of a kernel. Two ops are called once for each
index there, because a whole batch shares their weights: `squeeze_excite` and `attention_residual`.

Opacus (`GradSampleModule`, `PrivacyEngine`) takes the modules as they are; for `MRLALight` and a padded
`RelPosAttention1d`, which have more than one input, call `fused_attn.integrations.opacus.register()` first.
`AttentionResidual`, whose input is a list, cannot be had: the hooks of Opacus take tensors alone.

The older way to batch gradients, `torch.autograd.grad(..., is_grads_batched=True)`, raises for ops that take lists of
tensors: use `torch.func.vmap` of the function that `torch.func.vjp` returns.
"""


def rows(impl: str) -> tuple[str, ...]:
    """Of an implementation: what compiles plain PyTorch is PyTorch's own."""
    return tuple(name for name in ROWS if impl != "reference" or name not in SLOW)


def grid(impls: Sequence[str]) -> dict[str, dict[str, dict[str, str]]]:
    """implementation -> transform -> op -> outcome."""
    return {
        impl: {name: {spec.name: outcome(spec, impl, sample_of(spec), name) for spec in SPECS} for name in rows(impl)}
        for impl in impls
    }


def page(cells: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    """The page in Markdown."""
    errors: list[str] = []

    def cell(result: str) -> str:
        if not result.startswith("error: "):
            return result
        if result not in errors:
            errors.append(result)
        return f"[{errors.index(result) + 1}]"

    lines = [HEADER]
    for impl, rows in cells.items():
        lines += [f"## `{impl}`", "", "| | " + " | ".join(f"`{spec.name}`" for spec in SPECS) + " |"]
        lines += ["| --- |" + " --- |" * len(SPECS)]
        lines += [
            f"| {name} | " + " | ".join(cell(row[spec.name]) for spec in SPECS) + " |" for name, row in rows.items()
        ]
        lines += [""]
    lines += [
        "## Errors",
        "",
        *(f"{i}. `{text.removeprefix('error: ')}`" for i, text in enumerate(errors, start=1)),
        "",
    ]
    return "\n".join(lines)


def published(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """implementation -> transform -> op -> outcome, as the page says."""
    errors = dict(re.findall(r"^(\d+)\. `(.*)`$", text, re.MULTILINE))
    cells: dict[str, dict[str, dict[str, str]]] = {}
    for line in text.splitlines():
        if heading := re.match(r"## `(\w+)`", line):
            rows = cells.setdefault(heading[1], {})
        elif line.startswith("| |"):
            ops = re.findall(r"`(\w+)`", line)
        elif cells and line.startswith("| ") and not line.startswith("| ---"):
            name, *row = (part.strip() for part in line.strip("|").split("|"))
            row = [f"error: {errors[text.strip('[]')]}" if text.startswith("[") else text for text in row]
            rows[name] = dict(zip(ops, row, strict=True))
    return cells


PAGE = Path(__file__).parents[1] / "docs" / "transforms.md"

if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(grid(("cpu", "reference"))))
