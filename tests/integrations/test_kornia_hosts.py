"""kornia's LoFTR: the confidences of its coarse matching and their gradients as before, and its matches."""

import pytest
import torch
from equality import assert_same, outputs_and_gradients

from fused_attn import integrations

CONFIG = {
    "thr": 0.0, "border_rm": 0, "train_coarse_percent": 0.3, "train_pad_num_gt_min": 200,
    "match_type": "dual_softmax", "dsmax_temperature": 0.1,
}  # fmt: skip
MASKS = ["no masks", "one mask", "both masks"]


@pytest.mark.parametrize("masks", range(3), ids=MASKS)
def test_coarse_matching(masks):
    matching = pytest.importorskip("kornia.feature.loftr.utils.coarse_matching", exc_type=ImportError)
    torch.manual_seed(0)
    layer = matching.CoarseMatching(CONFIG).eval()
    features = [torch.randn(2, length, 32, requires_grad=True) for length in (12, 20)]
    sizes = {"hw0_i": (24, 32), "hw1_i": (32, 40), "hw0_c": (3, 4), "hw1_c": (4, 5), "stride_c": 8}
    # Of two images each, padded to the right and below.
    given = [torch.arange(12) % 4 < torch.tensor([[4], [3]]), torch.arange(20) < torch.tensor([[20], [15]])]
    sides = given[:masks] + [None] * (2 - masks)

    def run():
        data = dict(sizes)
        grids = [None if side is None else side.unflatten(1, sizes[f"hw{i}_c"]) for i, side in enumerate(sides)]
        data.update({f"mask{i}": grid for i, grid in enumerate(grids) if grid is not None and masks == 2})
        layer(*features, data, *sides)
        found.append(data)
        return data["conf_matrix"]

    found = []
    parameters = {"feat_c0": features[0], "feat_c1": features[1]}
    expected = outputs_and_gradients(run, parameters)
    (candidate,) = integrations.convert(layer)
    assert candidate.fused
    assert_same(outputs_and_gradients(run, parameters), expected, tolerance=2e-5)
    before, after = found
    assert before.keys() == after.keys()
    for name in ("b_ids", "i_ids", "j_ids"):
        assert before[name].numel() > 0
        assert torch.equal(before[name], after[name])
    integrations.restore(layer)
    assert torch.equal(run(), before["conf_matrix"])


def test_optimal_transport_is_left_alone():
    matching = pytest.importorskip("kornia.feature.loftr.utils.coarse_matching", exc_type=ImportError)
    layer = matching.CoarseMatching(CONFIG)
    layer.match_type = "sinkhorn"
    (candidate,) = integrations.convert(layer)
    assert candidate.outcome == "matching by sinkhorn is not computed"
