"""The dual softmax of LoFTR and LightGlue as kornia computes them; skipped where kornia is not."""

import pytest
import torch
import torch.nn.functional as F
from equality import assert_same, outputs_and_gradients

from fused_attn import _extension
from fused_attn.modules import DualSoftmax

pytest.importorskip("kornia.feature", exc_type=ImportError)
from kornia.feature.lightglue import sigmoid_log_double_softmax
from kornia.feature.loftr.utils.coarse_matching import CoarseMatching

implementations = pytest.mark.parametrize(
    "impl",
    [
        "reference",
        pytest.param("cpu", marks=pytest.mark.skipif(not _extension.available(), reason=str(_extension.reason()))),
    ],
)
#: One block of the CPU kernels to a plane, and several.
SIZES = pytest.mark.parametrize("sizes", [(15, 20), (150, 130)], ids=str)
TEMPERATURE = 0.1


def draw(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


@implementations
@SIZES
@pytest.mark.parametrize("masked", [(), (0,), (0, 1)], ids=["no masks", "one mask", "both masks"])
def test_coarse_matching_of_loftr(impl, sizes, masked):
    config = {"thr": 0.2, "border_rm": 2, "train_coarse_percent": 0.3, "train_pad_num_gt_min": 200}
    host = CoarseMatching({**config, "match_type": "dual_softmax", "dsmax_temperature": TEMPERATURE})
    host.get_coarse_match = lambda conf_matrix, data: {}
    features = draw(feat_c0=(2, sizes[0], 32), feat_c1=(2, sizes[1], 32))
    # Padding is to the right and below: in rows of a grid, periodic; one image has none.
    masks = [torch.arange(2 * size).view(2, size) % 5 < 3 for size in sizes]
    masks[0][1] = True
    masks = [mask if i in masked else None for i, mask in enumerate(masks)]
    data = {}

    def theirs():
        host(*features.values(), data, *masks)
        return data["conf_matrix"]

    def ours():
        scaled = [feature / 32**0.5 for feature in features.values()]
        return DualSoftmax(TEMPERATURE, impl=impl)(torch.einsum("nlc,nsc->nls", *scaled), *masks)

    assert_same(outputs_and_gradients(ours, features), outputs_and_gradients(theirs, features))
    for dim, mask in zip((2, 1), masks, strict=True):
        if mask is not None:
            assert not ours().sum(dim)[~mask].any()


@implementations
@SIZES
def test_log_assignment_of_lightglue(impl, sizes):
    m, n = sizes
    tensors = draw(sim=(2, m, n), z0=(2, m, 1), z1=(2, n, 1))

    def ours():
        sim, z0, z1 = tensors.values()
        inner = DualSoftmax(log=True, impl=impl)(sim) + F.logsigmoid(z0) + F.logsigmoid(z1).transpose(1, 2)
        rows = torch.cat([inner, F.logsigmoid(-z0)], 2)
        return torch.cat([rows, F.pad(F.logsigmoid(-z1).transpose(1, 2), (0, 1))], 1)

    theirs = outputs_and_gradients(lambda: sigmoid_log_double_softmax(*tensors.values()), tensors)
    assert_same(outputs_and_gradients(ours, tensors), theirs)
