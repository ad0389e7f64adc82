"""lucidrains' bottleneck transformer: outputs and all gradients as before."""

import pytest
import torch
from equality import randomise
from host_checks import check, check_registered

from fused_attn import integrations
from fused_attn.integrations.lucidrains_hosts import HOSTS

SIZES = {"dim": 8, "fmap_size": (8, 6), "dim_out": 16, "num_layers": 2, "heads": 2, "dim_head": 6}


@pytest.fixture(scope="module")
def package(host_packages):
    return pytest.importorskip("bottleneck_transformer_pytorch")


def test_stack(package):
    """Two blocks on maps of two sizes."""
    stack = randomise(package.BottleStack(**SIZES, rel_pos_emb=True))
    x = torch.randn(2, 8, 8, 6, requires_grad=True)
    # Batch norms of two images magnify rounding: either form is up to 1.2e-4 from float64.
    check(stack, lambda: stack(x), tolerance=2e-4, x=x)


def test_another_map_runs_the_original(package):
    """As many positions in other rows and columns are no error there."""
    layer = randomise(package.BottleStack(**SIZES, rel_pos_emb=True)).net[0].net[3]
    x = torch.randn(2, 4, 4, 12)
    expected = layer(x)
    assert integrations.convert(layer).replaced == 1
    assert torch.equal(layer(x), expected)


def test_absolute_positions_are_left_alone(package):
    report = integrations.convert(package.BottleStack(**SIZES))
    assert [each.outcome for each in report] == 2 * [
        "absolute positions are added to the keys: plain attention, which PyTorch has"
    ]


def test_other_versions_are_left_alone(package, monkeypatch):
    monkeypatch.setattr(package, "__version__", "2.0", raising=False)
    (candidate, _) = integrations.convert(package.BottleStack(**SIZES, rel_pos_emb=True))
    assert candidate.outcome == "bottleneck_transformer_pytorch 2.0 is not from 0.1.4 to below 1"


def test_registered_classes_are_there(package):
    check_registered(HOSTS)
