"""Element-wise attention and dual softmax: batch statistics as BatchNorm2d keeps them, modules, and the definition."""

import io
import itertools

import pytest
import torch
from torch import nn

from fused_attn import _extension, elementwise_attention, row_col_softmax
from fused_attn.modules import DualSoftmax, ElementwiseAttention, ElementwiseAttentionBlock

implementations = pytest.mark.parametrize(
    "impl",
    [
        "reference",
        pytest.param("cpu", marks=pytest.mark.skipif(not _extension.available(), reason=str(_extension.reason()))),
    ],
)


def draw(*shapes, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(shape, generator=generator) for shape in shapes]


@implementations
def test_definition(impl):
    """Eq. 4-7 of the paper, one number at a time."""
    x, weight_row, weight_col = draw((2, 2, 3, 4), (3, 2, 3, 4), (3, 2, 3, 4))
    out = row_col_softmax(x, weight_row, weight_col, impl=impl)
    for b, h, c, i, j in itertools.product(*map(range, out.shape)):
        row = (x[b, c, i].double() * weight_row[h, c, i].double()).exp()
        col = (x[b, c, :, j].double() * weight_col[h, c, :, j].double()).exp()
        assert float(out[b, h, c, i, j]) == pytest.approx(float(row[j] / row.sum() * col[i] / col.sum()), rel=1e-5)


@implementations
@pytest.mark.parametrize("momentum", [0.1, 0.37, 1.0, None])
def test_running_statistics_are_those_of_batch_norm(impl, momentum):
    """Three batches in training mode, then evaluation, against BatchNorm2d on the product."""
    module = ElementwiseAttention(2, (5, 6), 3, momentum=momentum, std=1.0, impl=impl)
    norm = nn.BatchNorm2d(6, affine=False, momentum=momentum)
    for x in draw((4, 2, 5, 6), (1, 2, 5, 6), (3, 2, 5, 6)):
        out = module(x)
        product = row_col_softmax(x, module.weight_row, module.weight_col, impl="reference").flatten(1, 2)
        torch.testing.assert_close(out, norm(product) * x.repeat(1, 3, 1, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.norm.running_mean, norm.running_mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(module.norm.running_var, norm.running_var, rtol=1e-5, atol=1e-7)
    assert int(module.norm.num_batches_tracked) == 3
    module.eval(), norm.eval()
    before = module.norm.running_mean.clone()
    out = module(x)
    torch.testing.assert_close(out, norm(product) * x.repeat(1, 3, 1, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(module.norm.running_mean, before)


class _Functional(nn.Module):
    """A call of the function in training mode, its running statistics buffers or arguments."""

    def __init__(self, impl, buffers):
        super().__init__()
        self.impl, self.buffers_kept = impl, buffers
        if buffers:
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("var", torch.ones(6))

    def forward(self, x, weight_row, weight_col, mean=None, var=None):
        if self.buffers_kept:
            mean, var = self.mean, self.var
        return elementwise_attention(x, weight_row, weight_col, mean, var, training=True, impl=self.impl)


@implementations
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("statistics", ["buffers", "arguments", "none"])
def test_a_saved_program_in_training_mode(impl, statistics, strict):
    """export, save, load: outputs and running statistics of two batches, of a size that is dynamic."""
    x, *weights = draw((3, 2, 4, 5), (3, 2, 4, 5), (3, 2, 4, 5))
    buffers = statistics == "buffers"
    given, expected_given = ((torch.zeros(6), torch.ones(6)) if statistics == "arguments" else () for _ in range(2))
    arguments = (x, *weights, *given)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)}, *(None,) * (len(arguments) - 1))
    program = torch.export.export(_Functional(impl, buffers), arguments, dynamic_shapes=dynamic, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded, eager = torch.export.load(file).module(), _Functional(impl, buffers)
    for batch in draw((4, 2, 4, 5), (7, 2, 4, 5)):
        actual, expected = loaded(batch, *weights, *given), eager(batch, *weights, *expected_given)
        torch.testing.assert_close(actual, expected)
        kept = zip((*loaded.buffers(), *given), (*eager.buffers(), *expected_given), strict=True)
        assert all(torch.equal(a, b) and bool((a != 0).all()) for a, b in kept)


@implementations
def test_variance_of_an_almost_uniform_product(impl):
    """At the paper's initialisation the product deviates by parts in a hundred: its variance must not cancel."""
    x, *weights = draw((64, 1, 28, 28), (4, 1, 28, 28), (4, 1, 28, 28), scale=0.02)
    mean, var = torch.zeros(4), torch.zeros(4)
    elementwise_attention(x, *weights, mean, var, training=True, momentum=1.0, impl=impl)
    product = row_col_softmax(*(t.double() for t in (x, *weights)), impl="reference").transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), product.mean(1), rtol=1e-6, atol=0.0)
    # The softmaxes themselves are rounded to 24 bits: deviations of 1e-4 of them keep about 3 digits.
    torch.testing.assert_close(var.double(), product.var(1), rtol=2e-2, atol=0.0)


@implementations
def test_statistics_not_kept_and_empty_batches(impl):
    x, *weights = draw((2, 1, 3, 4), (2, 1, 3, 4), (2, 1, 3, 4))
    mean, var = torch.zeros(2), torch.ones(2)
    kept = elementwise_attention(x, *weights, mean, var, training=True, impl=impl)
    assert torch.equal(elementwise_attention(x, *weights, None, None, training=True, impl=impl), kept)
    before = mean.clone(), var.clone()
    assert elementwise_attention(x[:0], *weights, mean, var, training=True, impl=impl).shape == (0, 2, 3, 4)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert elementwise_attention(x, *(w[:0] for w in weights), mean[:0], var[:0], training=True, impl=impl).numel() == 0


@implementations
def test_dual_softmax_module(impl):
    (similarity,) = draw((2, 40, 33))
    expected = similarity.softmax(1) * similarity.softmax(2)
    torch.testing.assert_close(DualSoftmax(impl=impl)(similarity), expected, rtol=1e-5, atol=1e-8)
    out = DualSoftmax(impl=impl)(similarity.unsqueeze(0))
    torch.testing.assert_close(out, expected.unsqueeze(0), rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match=r"similarity must have shape .* got \(33,\)"):
        DualSoftmax()(similarity[0, 0])


@implementations
@pytest.mark.parametrize("sizes", [(10, 12), (150, 130)], ids=str)
def test_dual_softmax_with_masks_against_the_published_loftr(impl, sizes):
    """It fills with -1e9: the same but where a row and a column are both masked."""
    (similarity,) = draw((2, *sizes))
    row, col = (torch.arange(2 * size).view(2, size) % 7 < 4 for size in sizes)
    filled = (similarity / 0.1).masked_fill(~(row[:, :, None] & col[:, None]), -1e9)
    published = filled.softmax(1) * filled.softmax(2)
    neither = ~row[:, :, None] & ~col[:, None]
    torch.testing.assert_close(published[neither], torch.full_like(published[neither], 1 / sizes[0] / sizes[1]))
    out = DualSoftmax(0.1, impl=impl)(similarity, row, col)
    torch.testing.assert_close(out, published.masked_fill(neither, 0.0), rtol=2e-5, atol=1e-8)


@implementations
@pytest.mark.parametrize("sizes", [(10, 12), (150, 130)], ids=str)
def test_logarithm_where_the_product_underflows(impl, sizes):
    (similarity,) = draw((1, *sizes), scale=60.0)
    out = DualSoftmax(0.5, log=True, impl=impl)(similarity)
    exact = similarity.double() / 0.5
    expected = exact.log_softmax(1) + exact.log_softmax(2)
    assert bool((expected.exp().float() == 0.0).any())
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-4)


@implementations
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("sizes", [(10, 12), (150, 130)], ids=str)
def test_nothing_of_what_masks_exclude_is_seen(impl, log, sizes):
    """NaN and infinity there, in similarities and gradients, change no bit."""
    similarity, grad_out = draw((2, *sizes), (2, *sizes))
    row, col = (torch.arange(2 * size).view(2, size) % 7 < 4 for size in sizes)
    kept = row[:, :, None] & col[:, None]
    results = []
    for fill in (0.0, float("nan"), float("inf")):
        x = similarity.where(kept, torch.tensor(fill)).requires_grad_()
        out = DualSoftmax(0.3, log, impl=impl)(x, row, col)
        (grad,) = torch.autograd.grad(out, x, grad_out.where(kept, torch.tensor(fill)))
        assert bool((out[~kept] == (float("-inf") if log else 0.0)).all())
        assert not grad[~kept].any()
        assert bool(grad[kept].isfinite().all())
        results.append((out, grad))
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_block(batch_norm):
    block = ElementwiseAttentionBlock(3, (5, 7), 4, batch_norm=batch_norm)
    (x,) = draw((6, 3, 5, 7))
    out = block(x)
    out.square().sum().backward()
    assert out.shape == x.shape
    assert bool((out >= 0).all())
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in block.parameters())
    assert isinstance(block.norm, nn.BatchNorm2d) == batch_norm


def test_modules_name_what_is_wrong():
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        ElementwiseAttention(1, (4, 4), 0)
    with pytest.raises(ValueError, match=r"size must be two positive numbers .* got \(0, 4\)"):
        ElementwiseAttention(1, (0, 4), 1)
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', .* got 'fast'"):
        DualSoftmax(impl="fast")
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        DualSoftmax(0.0)
    with pytest.raises(ValueError, match="kernel_size must be odd and positive, got 2"):
        ElementwiseAttentionBlock(1, (4, 4), 1, kernel_size=2)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 4, 5\), got \(2, 1, 5, 4\)"):
        ElementwiseAttention(1, (4, 5), 1)(torch.zeros(2, 1, 5, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ElementwiseAttention(1, (1, 1), 2)(torch.zeros(1, 1, 1, 1))


@pytest.mark.skipif(not _extension.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize(
    ("batch", "heads", "grid"),
    [(80, 32, (32, 32)), (92, 32, (27, 29)), (92, 32, (28, 28)), (1, None, (1450, 1504)), (1, None, (1450, 1501))],
)
def test_outputs_too_large_for_the_caches(batch, heads, grid):
    """They are streamed: rows where they are aligned, else whole blocks."""
    x = torch.randn(batch, 1, *grid, requires_grad=True)
    weights = [torch.randn(heads, 1, *grid, requires_grad=True) for _ in range(2)] if heads else []
    functions = [
        row_col_softmax,
        lambda *tensors, impl: elementwise_attention(*tensors, None, None, training=True, impl=impl),
    ]
    for function in functions if heads else functions[:1]:
        results = []
        for impl in ("cpu", "reference"):
            out = function(x, *weights, impl=impl)
            assert out.numel() * 4 >= 8 << 20
            grad_out = torch.linspace(-1, 1, out.numel()).view(out.shape)
            results.append((out, *torch.autograd.grad(out, [x, *weights], grad_out)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
