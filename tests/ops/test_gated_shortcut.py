"""gated_shortcut: its equation and gradients, memory order, autocast and bad input."""

import pytest
import torch

from fused_attn.ops.layer_attention.gated_shortcut import gated_shortcut


def inputs(batch=2, groups=3, per_group=2, spatial=(4, 3), dtype=torch.float64):
    torch.manual_seed(0)
    channels = groups * per_group
    shapes = (batch, groups), (batch, channels, *spatial), (channels,), (batch, channels, *spatial)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("spatial", [(), (5,), (4, 3), (2, 3, 2)])
@pytest.mark.parametrize("per_group", [1, 4])
def test_equation(spatial, per_group):
    gate, value, weight, shortcut = inputs(per_group=per_group, spatial=spatial)
    out = gated_shortcut(gate, value, weight, shortcut)
    for b in range(2):
        for c in range(value.shape[1]):
            expected = gate[b, c // per_group] * value[b, c] + weight[c] * shortcut[b, c]
            torch.testing.assert_close(out[b, c], expected)


def test_gradients():
    assert torch.autograd.gradcheck(gated_shortcut, inputs())
    assert torch.autograd.gradgradcheck(gated_shortcut, inputs(batch=1, groups=2, spatial=(2,)))


def test_channels_last_in_channels_last_out():
    gate, value, weight, shortcut = inputs()
    expected = gated_shortcut(gate, value, weight, shortcut)
    value, shortcut = (x.detach().to(memory_format=torch.channels_last) for x in (value, shortcut))
    out = gated_shortcut(gate, value, weight, shortcut)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)


def test_saves_the_maps_and_nothing_else_of_their_size():
    arguments, saved = inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        gated_shortcut(*arguments)
    maps = {x.data_ptr() for x in saved if x.dim() == 4 and x.shape[2:] == (4, 3) and x.stride(-1)}
    assert maps == {arguments[1].data_ptr(), arguments[3].data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    gate, value, weight, shortcut = (x.detach() for x in inputs(dtype=torch.float32))
    shortcut *= 1e6  # more than float16 has
    with torch.autocast("cpu", dtype=dtype):
        out = gated_shortcut(gate, value.to(dtype), weight, shortcut)
        plain = gate.repeat_interleave(2, 1)[..., None, None] * value + weight[:, None, None] * shortcut
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1.0)
        low = gated_shortcut(gate, value.to(dtype), weight, (shortcut * 1e-6).to(dtype))
    assert (out.dtype, low.dtype) == (torch.float32, dtype)


def test_empty_batch():
    assert gated_shortcut(*inputs(batch=0)).shape == (0, 6, 4, 3)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"gate": [[1.0]]}, TypeError, "gate must be a tensor, got list"),
        ({"weight": torch.ones(6, dtype=torch.int64)}, TypeError, "weight must have a floating-point dtype"),
        ({"value": torch.ones(6).double()}, ValueError, r"value must have shape \(B, C, \*spatial\), got \(6,\)"),
        ({"gate": torch.ones(2, 4).double()}, ValueError, r"G a divisor of C=6, got \(2, 4\)"),
        ({"gate": torch.ones(2, 0).double()}, ValueError, r"G a divisor of C=6, got \(2, 0\)"),
        ({"gate": torch.ones(3, 3).double()}, ValueError, r"\(B, G\) with B=2 .* got \(3, 3\)"),
        (
            {"weight": torch.ones(6, 1, 1).double()},
            ValueError,
            r"weight must have shape \(C,\)=\(6,\), got \(6, 1, 1\)",
        ),
        (
            {"shortcut": torch.ones(2, 6, 4, 4).double()},
            ValueError,
            r"shape of value, \(2, 6, 4, 3\), got \(2, 6, 4, 4\)",
        ),
        ({"shortcut": torch.ones(2, 6, 4, 3)}, ValueError, "shortcut must have the dtype of gate, torch.float64"),
        ({"weight": torch.ones(6, device="meta").double()}, ValueError, "weight must be on the device of gate, cpu"),
        ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', .* got 'cuda'"),
    ],
)
def test_bad_input(changes, error, match):
    arguments = dict(zip(("gate", "value", "weight", "shortcut"), inputs(), strict=True))
    with pytest.raises(error, match=match):
        gated_shortcut(**{**arguments, **changes})
