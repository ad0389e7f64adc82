"""Proof of the contract test: implementations broken on purpose, each caught by the check meant for it.

Every fake poses as ``impl="cpu"`` of a real spec, and is the reference with one thing wrong.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from bad_inputs import BAD_INPUTS

from fused_attn.bench.measure import find_spec
from fused_attn.ops._floor.declarations import Shape, differentiable
from fused_attn.testing import checks
from fused_attn.testing.numerics import _fingerprint, mismatches, numeric_mismatches, ulp

SPECS = REL, BIAS = find_spec("rel_attention_2d"), find_spec("decomposed_bias_attention")
IMPL = "cpu"


class _Edited(torch.autograd.Function):
    """The reference, with its output and gradients passed through ``edit(name, tensor)``; works in place of an op."""

    @staticmethod
    def forward(ctx, function, edit, names, options, *tensors):
        ctx.call = function, edit, names, options, torch.get_rng_state()
        ctx.save_for_backward(*tensors)
        return edit("out", function(**dict(zip(names, tensors, strict=True)), **options))

    @staticmethod
    def backward(ctx, grad_out):
        function, edit, names, options, state = ctx.call
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(edit("rng_state", state))
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            out = function(**dict(zip(names, leaves, strict=True)), **options)
        grads = torch.autograd.grad(out, leaves, grad_out)
        return (None, None, None, None, *(edit(f"grad_{name}", g) for name, g in zip(names, grads, strict=True)))


def fake(spec, edit=lambda name, tensor: tensor, before=lambda inputs: inputs):
    """``spec`` whose implementation is the reference of ``before(inputs)`` with ``edit`` applied to what it gives."""

    def reference(**inputs):
        return spec.function(**inputs, impl="reference")

    def function(*, impl="auto", **inputs):
        if impl != IMPL:
            return spec.function(**inputs, impl=impl)
        inputs = before(inputs)
        names = differentiable(inputs)
        options = {name: value for name, value in inputs.items() if name not in names}
        # The state of the generator is what a seed is to a kernel: forward and backward start from the same.
        state = torch.get_rng_state()

        def seeded(**call):
            torch.set_rng_state(state)
            return reference(**call)

        return _Edited.apply(seeded, edit, names, options, *(inputs[name] for name in names))

    return replace(spec, function=function)


def only(names, change):
    """An ``edit`` of the tensors in ``names``."""
    names = (names,) if isinstance(names, str) else names
    return lambda name, tensor: change(tensor) if name in names else tensor


def fails(check, spec, sample, dtype) -> bool:
    """Whether ``check`` raises AssertionError on ``sample``."""
    try:
        check(spec, IMPL, sample.inputs(dtype))
    except AssertionError:
        return True
    return False


def finds(check, spec, dtype=torch.float32, samples=None) -> list[str]:
    """Samples of ``spec`` on which ``check`` raises AssertionError."""
    return [sample.name for sample in samples or spec.samples if fails(check, spec, sample, dtype)]


def catches(check, spec, dtype=torch.float32, samples=None) -> bool:
    """Whether there is such a sample; those after it are left out."""
    return any(fails(check, spec, sample, dtype) for sample in samples or spec.samples)


def small(spec):
    return [sample for sample in spec.samples if sample.small]


# --- a sane implementation passes -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    "check",
    [
        checks.check_numerics,
        checks.check_grad_out_layouts,
        checks.check_partial_gradients,
        checks.check_inputs_unchanged,
        checks.check_deterministic,
    ],
)
def test_sane_implementation_passes(spec, check):
    assert finds(check, fake(spec), samples=small(spec)) == []


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sane_implementation_passes_numerics_on_every_sample(spec, dtype):
    assert finds(checks.check_numerics, fake(spec), dtype) == []


def test_sane_implementation_passes_with_nan_and_infinity():
    samples = [sample for sample in small(REL) if sample.name == "small"]
    assert finds(checks.check_non_finite, fake(REL), samples=samples) == []


# --- wrong numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("argument", range(-1, 5))
@pytest.mark.parametrize(
    "change",
    [
        torch.neg,
        torch.zeros_like,
        lambda tensor: tensor * 1.001,
        lambda tensor: tensor.bfloat16().float(),
        lambda tensor: tensor.half().float(),
        lambda tensor: tensor.roll(1, -2),
        lambda tensor: tensor.flip(-1),
    ],
    ids=["sign", "missing", "scale", "bfloat16", "float16", "off by one", "reversed"],
)
def test_one_wrong_result(spec, argument, change):
    """Each result of its own: the mismatch names it and no other."""
    inputs = next(sample for sample in spec.samples if sample.name == "width 8").inputs(torch.float32)
    name = "out" if argument < 0 else f"grad_{list(differentiable(inputs))[argument]}"
    found = numeric_mismatches(spec, checks.bound(fake(spec, only(name, change)), IMPL), inputs)
    assert [text.split(":")[0] for text in found] == [name]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("name", ["out", "grad_query", "grad_key", "grad_value"])
def test_unwritten_row(spec, name):
    def last_row_unwritten(tensor):
        result = tensor.new_empty(tensor.shape)
        result[:, :, :-1] = tensor[:, :, :-1]
        return result

    assert catches(checks.check_numerics, fake(spec, only(name, last_row_unwritten)), samples=small(spec))


def test_unwritten_element_that_happens_to_hold_the_right_value():
    """What the NaN filling is for: stale memory may hold the last call's result, which is right."""
    results = {}

    def stale(name, tensor):
        if name == "rng_state":
            return tensor
        result = tensor.new_empty(tensor.shape)
        last = result.reshape(-1)[-1:]
        if not bool(last.isnan().any()):  # memory as the previous call left it
            return tensor
        result.copy_(tensor)
        result.view(-1)[-1:] = results.get(name, float("nan"))
        return result

    assert catches(checks.check_numerics, fake(REL, stale), samples=small(REL))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_tail_of_a_width_left_out(spec):
    """As when the last partial vector of a row is dropped: right for widths that are multiples of 8."""

    def without_tail(inputs):
        width = inputs["key"].shape[3]
        if width % 8 == 0 or width < 8:
            return inputs
        value = inputs["value"].clone()
        value[:, :, :, width - width % 8 :] = 0.0
        return {**inputs, "value": value}

    found = finds(checks.check_numerics, fake(spec, before=without_tail))
    assert {"width 17", "width 33", "primes 13x7", "width 130"} - set(found) == {"primes 13x7"}
    assert "width 16" not in found


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("table", ["rel_h", "rel_w"])
def test_table_index_off_by_one(table, shift):
    def rolled(inputs):
        return {**inputs, table: inputs[table].roll(shift, -2)} if table in inputs else inputs

    assert catches(checks.check_numerics, fake(REL, before=rolled), samples=small(REL))


def test_index_convention_swapped():
    def swapped(inputs):
        return {**inputs, "index": "key_minus_query"}

    found = finds(checks.check_numerics, fake(REL, before=swapped))
    assert found
    assert all("query_minus_key" in name for name in found)


def test_tables_of_the_first_head_for_all():
    def first(inputs):
        changed = {
            n: inputs[n][:1].expand_as(inputs[n]) for n in ("rel_h", "rel_w") if n in inputs and inputs[n].dim() == 3
        }
        return {**inputs, **changed}

    assert "per-head tables" in finds(checks.check_numerics, fake(REL, before=first), samples=small(REL))


def test_rel_scale_ignored():
    def ignored(inputs):
        return {name: value for name, value in inputs.items() if name != "rel_scale"}

    assert catches(checks.check_numerics, fake(REL, before=ignored))


def test_wrong_mask():
    def large_but_finite(inputs):
        return {n: v.clamp_min(-20.0) if n in ("bias_h", "bias_w") else v for n, v in inputs.items()}

    found = finds(checks.check_numerics, fake(BIAS, before=large_but_finite))
    assert found
    assert all("masked" in name for name in found)


def test_fully_masked_query_averages_instead_of_zero():
    def uniform(inputs):
        return {n: v.clamp_min(-1e30) if n in ("bias_h", "bias_w") else v for n, v in inputs.items()}

    found = finds(checks.check_numerics, fake(BIAS, before=uniform))
    assert "masked image" in found
    assert all("masked" in name for name in found)


def test_dropout_mask_drawn_anew_in_the_backward_pass():
    spec = REL

    def function(*, impl="auto", **inputs):
        if impl != IMPL or not inputs.get("dropout_p"):
            return spec.function(**inputs, impl="reference")
        names = differentiable(inputs)
        out = spec.function(**inputs, impl="reference").detach()
        other = spec.function(**inputs, impl="reference")  # the generator has moved on
        return out + other - other.detach() if names else out

    found = finds(checks.check_numerics, replace(spec, function=function), samples=small(spec))
    assert found == [sample.name for sample in small(spec) if "dropout" in sample.name]


def test_dropout_without_rescaling():
    def scaled(inputs):
        if not inputs.get("dropout_p"):
            return inputs
        return {**inputs, "value": inputs["value"] * (1.0 - inputs["dropout_p"])}

    assert finds(checks.check_numerics, fake(REL, before=scaled), samples=small(REL)) == [
        sample.name for sample in small(REL) if "dropout" in sample.name
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_than_asked_for(dtype):
    def lowered(inputs):
        return {n: v.to(dtype).float() if n in ("query", "key", "value") else v for n, v in inputs.items()}

    found = finds(checks.check_numerics, fake(REL, before=lowered))
    assert len(found) > len(REL.samples) / 2


def test_output_of_another_dtype():
    edit = only("out", lambda tensor: tensor.float())
    assert catches(checks.check_numerics, fake(REL, edit), torch.bfloat16, samples=small(REL))


def test_strides_ignored():
    def as_if_contiguous(inputs):
        changed = {}
        for name in ("query", "key", "value"):
            tensor = inputs[name]
            strides = torch.empty(tensor.shape, device="meta").stride()
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
            if (
                tensor.numel()
                and (tensor.storage_offset() + reach) * tensor.element_size() < tensor.untyped_storage().nbytes()
            ):
                changed[name] = tensor.as_strided(tensor.shape, strides)
        return {**inputs, **changed}

    found = finds(checks.check_numerics, fake(REL, before=as_if_contiguous))
    assert {"channels_last", "channels first", "heads first", "spread", "slice of qkv", "mixed layouts"} <= set(found)
    assert "small" not in found


def test_gradient_of_the_output_read_as_contiguous():
    def first_elements(function):
        class Misread(torch.autograd.Function):
            @staticmethod
            def forward(ctx, out):
                return out.clone()

            @staticmethod
            def backward(ctx, grad_out):
                if grad_out.is_contiguous():
                    return grad_out
                return torch.full_like(grad_out, float(grad_out.flatten()[0])).contiguous()

        return lambda **inputs: Misread.apply(function(**inputs)) if inputs["impl"] == IMPL else function(**inputs)

    def reference(*, impl, **inputs):
        return REL.function(**inputs, impl="reference")

    spec = replace(REL, function=first_elements(reference))
    assert finds(checks.check_numerics, spec, samples=small(REL)) == []
    assert catches(checks.check_grad_out_layouts, spec, samples=small(REL))


def test_nan_swallowed():
    samples = [sample for sample in small(REL) if sample.name == "small"]
    for names in ("out", "grad_query"):
        assert catches(checks.check_non_finite, fake(REL, only(names, torch.nan_to_num)), samples=samples)


def test_nan_spread_to_other_images():
    def spread(tensor):
        return torch.full_like(tensor, float("nan")) if bool(tensor.isnan().any()) else tensor

    samples = [sample for sample in small(REL) if sample.name == "small"]
    assert catches(checks.check_non_finite, fake(REL, only("out", spread)), samples=samples)


# --- wrong behaviour --------------------------------------------------------------------------------------------


def test_sum_in_a_changing_order():
    calls = itertools.count()

    def reordered(tensor):
        # The last bit moves from call to call, as with atomics.
        return tensor.nextafter(torch.full_like(tensor, float("inf"))) if next(calls) % 3 == 2 else tensor

    assert catches(checks.check_deterministic, fake(REL, only("grad_rel_h", reordered)), samples=small(REL))


def test_result_that_depends_on_the_number_of_threads():
    def changed(tensor):
        return tensor.nextafter(torch.full_like(tensor, 9.0)) if torch.get_num_threads() > 1 else tensor

    assert catches(checks.check_deterministic, fake(REL, only("out", changed)), samples=small(REL))


def test_input_written():
    def scaled_in_place(inputs):
        with torch.no_grad():
            inputs["query"].mul_(1.0000001).add_(1e-9)
        return inputs

    assert catches(checks.check_inputs_unchanged, fake(REL, before=scaled_in_place), samples=small(REL))


def test_partial_gradient_missing():
    def constant(tensor):
        return torch.zeros_like(tensor)

    calls = itertools.count()

    def first_only(tensor):
        return tensor if next(calls) == 0 else constant(tensor)

    assert catches(checks.check_partial_gradients, fake(REL, only("grad_key", first_only)), samples=small(REL)[:1])


def test_silent_fallback_to_the_reference():
    own = torch.library.custom_op(
        "fused_attn_test::own", lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    operator = torch.ops.fused_attn_test.own.default
    spec = replace(
        fake(REL),
        operators=lambda impl, inputs: ((operator, (inputs["query"],)),) if impl == IMPL else (),
        implementations={IMPL: lambda inputs: None, "reference": lambda inputs: None},
    )
    assert catches(checks.check_runs_its_operators, spec, samples=small(REL)[:1])

    def through_own_operator(inputs):
        own(inputs["query"])
        return inputs

    sane = replace(spec, function=fake(REL, before=through_own_operator).function)
    assert finds(checks.check_runs_its_operators, sane, samples=small(REL)[:1]) == []


def test_fallback_where_it_cannot_run():
    spec = replace(fake(REL), implementations={IMPL: lambda inputs: "it is Sunday"})
    assert catches(checks.check_refuses, spec, samples=small(REL)[:1])

    def refuse(**inputs):
        raise RuntimeError("no")

    assert catches(checks.check_refuses, replace(spec, function=refuse), samples=small(REL)[:1])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_bad_input_accepted_or_answered_wrongly(spec):
    def accepts(**inputs):
        return None

    def other_error(**inputs):
        raise KeyError("query")

    def other_message(**inputs):
        raise bad.error("something is wrong")

    for bad in BAD_INPUTS[spec.name]:
        for function in (accepts, other_error, other_message):
            with pytest.raises(AssertionError):
                checks.check_bad_input(replace(spec, function=function), bad)


def test_autocast_ignored():
    def posing(*, impl, **inputs):
        return REL.function(**inputs, impl="reference")

    def function(*, impl, **inputs):
        with torch.autocast("cpu", enabled=False):
            return REL.function(**inputs, impl="reference")

    assert finds(checks.check_autocast, replace(REL, function=posing), samples=small(REL)) == []
    assert catches(checks.check_autocast, replace(REL, function=function), samples=small(REL)[:1])


def test_wrong_second_derivative():
    def posing(*, impl, **inputs):
        return REL.function(**inputs, impl="reference")

    def first_order(*, impl, **inputs):
        """The gradient of the query is right, but a constant of it."""
        out = REL.function(**inputs, impl="reference")
        query = inputs["query"]
        return out if impl == "reference" else out + 1e-3 * (query.detach() * query - query * query / 2).sum()

    samples = small(REL)[:1]
    assert finds(checks.check_double_backward, replace(REL, function=posing), samples=samples) == []
    assert catches(checks.check_double_backward, replace(REL, function=first_order), samples=samples)


def test_wrong_gradient_of_the_reference():
    def doubled(*, impl, **inputs):
        query = inputs["query"]
        return REL.function(**{**inputs, "query": query + query - query.detach()}, impl="reference")

    sample = small(REL)[0].inputs(torch.float64)
    checks.check_gradcheck(REL, sample)
    with pytest.raises(AssertionError):
        checks.check_gradcheck(replace(REL, function=doubled), sample)


def test_graph_break():
    def function(*, impl, **inputs):
        if impl == IMPL:
            torch._dynamo.graph_break()
        return REL.function(**inputs, impl="reference")

    with pytest.raises(AssertionError, match="not one graph"):
        checks.check_compiled(
            replace(REL, function=function), IMPL, small(REL)[0].inputs(torch.float32), backend="aot_eager"
        )


def test_quadratic_memory():
    with pytest.raises(AssertionError, match="MiB beyond the inputs"):
        checks.check_memory(REL, "reference", REL.growth[1])


# --- what is remembered of the reference -------------------------------------------------------------------------


def test_reference_is_remembered_for_the_same_calls_only():
    sample = next(sample for sample in REL.samples if sample.name == "width 8")
    inputs = sample.inputs(torch.float32)
    query = inputs["query"]
    changed = query.clone()
    changed[0, 0, 0, 0, 0] += 1e-6
    others = {
        "another draw": sample.inputs(torch.float32, draw=1),
        "one element": {**inputs, "query": changed},
        "strides": {**inputs, "query": query.transpose(0, 1).contiguous().transpose(0, 1)},
        "dtype": sample.inputs(torch.float64),
        "option": {**inputs, "scale": 0.5},
        "sequence": {**inputs, "scale": [0.5]},
        "no table": {name: value for name, value in inputs.items() if name != "rel_h"},
    }
    assert query.stride() != others["strides"]["query"].stride()
    assert _fingerprint(inputs) == _fingerprint(sample.inputs(torch.float32))
    assert len({_fingerprint(call) for call in (inputs, *others.values())}) == 1 + len(others)


def test_oldest_results_go_when_there_are_too_many():
    memory, computed = checks.Memory(limit=100), []

    def result(key, elements):
        def compute():
            computed.append(key)
            return None, {"out": torch.zeros(elements, dtype=torch.uint8)}

        return memory(key, compute)

    for key, elements in (("a", 60), ("a", 60), ("b", 40), ("c", 30), ("b", 40), ("a", 60), ("large", 200), ("a", 60)):
        assert result(key, elements)[1]["out"].numel() == elements
        assert memory.bytes <= memory.limit
    assert computed == ["a", "b", "c", "a", "large", "a"]


def test_wrong_implementation_is_found_where_the_reference_is_remembered():
    sample = small(REL)[0]
    spec = fake(REL, only("out", lambda tensor: tensor * factor))
    factor = 1.0
    assert finds(checks.check_numerics, spec, samples=[sample]) == []
    factor = 1.001
    assert finds(checks.check_numerics, spec, samples=[sample]) == [sample.name]


# --- the bar itself ---------------------------------------------------------------------------------------------


def test_bar_of_the_largest_error():
    """Four times the reference's plus 2 ulp."""
    oracle = {"out": torch.full((100,), -3.0, dtype=torch.float64)}
    same = {"out": torch.full((100,), -3.0)}
    same["out"][0] += 2.0**-20
    unit = ulp(3.0, torch.float32)
    assert unit == 2.0**-22
    other = torch.full((100,), -3.0)
    other[1] += 4 * 2.0**-20 + 2 * unit
    assert mismatches({"out": other}, same, oracle) == []
    other[1] += unit
    assert "out: error" in mismatches({"out": other}, same, oracle)[0]


def test_bar_of_the_root_mean_square():
    """Twice the reference's plus 2 ulp."""
    oracle = {"out": torch.full((100,), -3.0, dtype=torch.float64)}
    same = {"out": torch.full((100,), -3.0 + 2.0**-20)}
    unit = ulp(3.0, torch.float32)
    bar = 2 * 2.0**-20 + 2 * unit
    assert mismatches({"out": torch.full((100,), -3.0 + bar)}, same, oracle) == []
    assert "RMS" in mismatches({"out": torch.full((100,), -3.0 + bar + unit)}, same, oracle)[0]


def test_bar_of_a_tensor_that_cancels():
    oracle = {"out": torch.ones(1).double(), "grad_query": torch.zeros(1).double()}
    same = {"out": torch.ones(1), "grad_query": torch.zeros(1)}
    bar = 2 * ulp(1.0, torch.float32)
    assert mismatches({"out": torch.ones(1), "grad_query": torch.full((1,), bar)}, same, oracle) == []
    assert mismatches({"out": torch.ones(1), "grad_query": torch.full((1,), 1.01 * bar)}, same, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0, 1.999, 3.0, 1e-3, 240.0])
def test_ulp_is_the_distance_to_the_next_number(dtype, value):
    x = torch.tensor(value, dtype=dtype)
    following = torch.nextafter(x, torch.tensor(float("inf"), dtype=dtype))
    assert ulp(float(x), dtype) == float(following.double() - x.double())


def test_shapes_are_samples():
    assert isinstance(REL.shape(REL.shapes[0].name), Shape)
    with pytest.raises(KeyError, match="no shape"):
        REL.shape("missing")
