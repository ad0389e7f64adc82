"""Every op under every transform of PyTorch gives the right values, or the error that docs/transforms.md publishes."""

import os

import pytest
import torch
import transforms

from fused_attn import create_model
from fused_attn.ops import SPECS
from fused_attn.ops._floor import dispatch

PUBLISHED = transforms.published(transforms.PAGE.read_text())
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def test_the_page_is_what_its_cells_say():
    assert transforms.page(PUBLISHED) == transforms.PAGE.read_text()
    for impl in ("cpu", "reference"):
        assert list(PUBLISHED[impl]) == list(transforms.rows(impl))


@pytest.mark.parametrize(
    ("impl", "name"),
    [(impl, name) for impl in (["triton"] if INTERPRETED else ["cpu", "reference"]) for name in transforms.rows(impl)],
)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_cell(spec, impl, name):
    sample = transforms.sample_of(spec)
    reason = spec.reason(impl, sample.inputs(torch.float32))
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")
    expected = PUBLISHED["cpu" if impl == "triton" else impl][name][spec.name]
    assert transforms.outcome(spec, impl, sample, name) == expected


def test_forward_mode_of_a_whole_network():
    network = create_model("aa_wrn_10_1", num_classes=4, attention_blocks="all").eval().requires_grad_(False)
    x, direction = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    out, tangent = torch.func.jvp(network, (x,), (direction,))
    plain = create_model("aa_wrn_10_1", num_classes=4, attention_blocks="all", impl="reference")
    plain.load_state_dict(network.state_dict())
    plain = plain.eval().requires_grad_(False).double()
    expected = torch.func.jvp(plain, (x.double(),), (direction.double(),))
    torch.testing.assert_close((out.double(), tangent.double()), expected, rtol=1e-4, atol=1e-5)
    # A tangent that is lost in the attention alone leaves that of the convolutions beside it: wrong, but not zero.
    assert dispatch.cpu_reason(x) is None
