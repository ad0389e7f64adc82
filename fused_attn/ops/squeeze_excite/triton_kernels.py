"""Triton kernels of squeeze-excite's maps: the squeeze, the scaling, and the two passes of backward.

A map is (CHANNELS, POSITIONS) per sample, or (POSITIONS, CHANNELS) channels last; a tile is BLOCK_C channels by BLOCK_P
positions of one sample.  The sizes are compile-time constants, so that the alignment of every row is known.  All sums
are over the tiles of one program: no atomics, the same bits at every run.
"""

import triton
import triton.language as tl

from .triton_layer_kernels import through_gate


@triton.jit
def _offsets(channel, position, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets inside a map, and where there is an element."""
    if CHANNELS_LAST:
        offsets = channel[:, None] + position[None, :] * CHANNELS
    else:
        offsets = channel[:, None] * POSITIONS + position[None, :]
    return offsets, (channel < CHANNELS)[:, None] & (position < POSITIONS)[None, :]


@triton.jit
def _relu(x):
    """Zero where x <= 0, as in torch.relu: NaN stays."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def _active(grad_out_ptr, out_ptr, offsets, mask):
    """The gradient that reaches x * scale + residual."""
    grad = tl.load(grad_out_ptr + offsets, mask, 0.0).to(tl.float32)
    if out_ptr is not None:
        out = tl.load(out_ptr + offsets, mask, 0.0).to(tl.float32)
        grad = tl.where(out <= 0.0, 0.0, grad)
    return grad


@triton.jit
def squeeze_fwd_kernel(
    x_ptr,
    z_ptr,  # (B, CHANNELS) float32: means
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    blocks = tl.cdiv(CHANNELS, BLOCK_C)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += sample * (CHANNELS * POSITIONS)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, POSITIONS, BLOCK_P):
        offsets, mask = _offsets(channel, start + tl.arange(0, BLOCK_P), CHANNELS, POSITIONS, CHANNELS_LAST)
        total += tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
    tl.store(z_ptr + sample * CHANNELS + channel, tl.div_rn(tl.sum(total, 1), POSITIONS * 1.0), channel < CHANNELS)


@triton.jit
def scale_fwd_kernel(
    x_ptr,
    scale_ptr,  # (B, CHANNELS) float32
    residual_ptr,  # or None
    out_ptr,
    RELU: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    across, down = tl.cdiv(POSITIONS, BLOCK_P), tl.cdiv(CHANNELS, BLOCK_C)
    tile = tl.program_id(0) % (across * down)
    sample = (tl.program_id(0) // (across * down)).to(tl.int64)
    channel = tile // across * BLOCK_C + tl.arange(0, BLOCK_C)
    position = tile % across * BLOCK_P + tl.arange(0, BLOCK_P)
    offsets, mask = _offsets(channel, position, CHANNELS, POSITIONS, CHANNELS_LAST)
    base = sample * (CHANNELS * POSITIONS)
    scale = tl.load(scale_ptr + sample * CHANNELS + channel, channel < CHANNELS, 0.0)
    y = tl.load(x_ptr + base + offsets, mask, 0.0).to(tl.float32) * scale[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + base + offsets, mask, 0.0).to(tl.float32)
    if RELU:
        y = _relu(y)
    tl.store(out_ptr + base + offsets, y, mask)


@triton.jit
def scale_bwd_kernel(
    grad_out_ptr,
    out_ptr,  # None without an activation
    x_ptr,
    scale_ptr,  # (B, CHANNELS) float32
    grad_residual_ptr,  # or None
    grad_logits_ptr,  # (B, CHANNELS) float32: of the gate's argument
    grad_share_ptr,  # (B, CHANNELS), the same where the result's share is a part of that argument; or None
    GATE: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    blocks = tl.cdiv(CHANNELS, BLOCK_C)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    base = sample * (CHANNELS * POSITIONS)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, POSITIONS, BLOCK_P):
        offsets, mask = _offsets(channel, start + tl.arange(0, BLOCK_P), CHANNELS, POSITIONS, CHANNELS_LAST)
        grad = _active(grad_out_ptr, out_ptr, base + offsets, mask)
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + base + offsets, grad, mask)
        total += grad * tl.load(x_ptr + base + offsets, mask, 0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * CHANNELS + channel, channel < CHANNELS, 0.0)
    grad_logits = through_gate(tl.sum(total, 1), scale, GATE)
    tl.store(grad_logits_ptr + sample * CHANNELS + channel, grad_logits, channel < CHANNELS)
    if grad_share_ptr is not None:
        tl.store(grad_share_ptr + sample * CHANNELS + channel, grad_logits, channel < CHANNELS)


@triton.jit
def squeeze_bwd_kernel(
    grad_out_ptr,
    out_ptr,  # None without an activation, or where grad_out_ptr is the residual's gradient already
    scale_ptr,  # (B, CHANNELS) float32
    grad_z_ptr,  # (B, CHANNELS) float32: gradient of the means
    grad_x_ptr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    across, down = tl.cdiv(POSITIONS, BLOCK_P), tl.cdiv(CHANNELS, BLOCK_C)
    tile = tl.program_id(0) % (across * down)
    sample = (tl.program_id(0) // (across * down)).to(tl.int64)
    channel = tile // across * BLOCK_C + tl.arange(0, BLOCK_C)
    position = tile % across * BLOCK_P + tl.arange(0, BLOCK_P)
    offsets, mask = _offsets(channel, position, CHANNELS, POSITIONS, CHANNELS_LAST)
    base = sample * (CHANNELS * POSITIONS)
    scale = tl.load(scale_ptr + sample * CHANNELS + channel, channel < CHANNELS, 0.0)
    grad_z = tl.load(grad_z_ptr + sample * CHANNELS + channel, channel < CHANNELS, 0.0)
    grad = _active(grad_out_ptr, out_ptr, base + offsets, mask)
    tl.store(grad_x_ptr + base + offsets, grad * scale[:, None] + tl.div_rn(grad_z, POSITIONS * 1.0)[:, None], mask)
