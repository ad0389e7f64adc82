"""Masks of -1e4, -1e9, -1e30, the least finite number and -inf, alone and mixed, and logits above 2^31.

Output and every gradient are the reference's, on every instruction set, and in interpreted/masks.py in Triton's
interpreter; the reference is PyTorch's softmax.
"""

import mask_checks as masks
import pytest
import torch

from fused_attn import _extension

ALL = [*masks.bias_cases(), *masks.OTHER_CASES, *masks.LARGE_CASES, *masks.HUGE_CASES, *masks.LARGE_HUGE_CASES]


# The instruction sets of one case beside one another: they share what the reference gives.
@pytest.mark.parametrize(
    ("capability", "case"),
    [
        pytest.param(capability, case, id=f"{capability}-{case.id}")
        for case in ALL
        for capability in _extension.CPU_CAPABILITIES
    ],
    indirect=["capability"],
)
def test_cpu_kernels_give_what_the_reference_gives(capability, case):
    found = list(case.mismatches("cpu"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("mask", masks.MASKS)
def test_a_masked_query_is_what_the_formula_makes_it(impl, mask):
    if impl == "cpu" and not _extension.available():
        pytest.skip(_extension.reason())
    torch.manual_seed(0)
    leaves = query, key, value = [torch.randn(1, 2, 3, 4, 8).requires_grad_() for _ in range(3)]
    bias_h, bias_w = torch.zeros(1, 2, 3, 4, 3), torch.zeros(1, 2, 3, 4, 4)
    bias_h[:, :, 1, 1] = masks.mask_value(mask, torch.float32)
    out = masks.SPEC["decomposed_bias_attention"].function(*leaves, bias_h, bias_w, impl=impl)
    # Not scaled_dot_product_attention: from its log-sum-exp, the gradients of such a query are a twelvefold.
    logits = query.flatten(2, 3) @ key.flatten(2, 3).mT * 8**-0.5
    dense = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(4).flatten(2, 3)
    expected = ((logits + dense).softmax(-1) @ value.flatten(2, 3)).view_as(out)
    if mask == "-inf":
        assert not out[:, :, 1, 1].any()
        return
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    if mask in ("-1e9", "-1e30", "finfo.min"):
        torch.testing.assert_close(out[:, :, 1, 1], value.mean((2, 3)))
    grad_out = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(y, leaves, grad_out) for y in (out, expected)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_logits_are_huge():
    """Else the cases above would show nothing."""
    for case in masks.HUGE_CASES:
        inputs = case.calls(torch.float32, "1e30", "1e30")[0]
        tensors = [tensor for value in inputs.values() for tensor in (value if isinstance(value, list) else [value])]
        assert max(float(tensor.abs().max()) for tensor in tensors if isinstance(tensor, torch.Tensor)) > 2.0**31


def test_sums_of_squares_that_overflow_leave_equal_weights():
    case = masks.SQUARES_CASE
    for inputs in case.calls(torch.float32, "1", "1"):
        out = masks.SPEC[case.op].function(**inputs, impl="cpu")
        torch.testing.assert_close(out, torch.stack(inputs["values"]).mean(0))
