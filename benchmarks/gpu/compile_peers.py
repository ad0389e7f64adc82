"""Triton kernels of the peers, as launches for the compile report, with no GPU.

``cases(arch)`` gives what can be compiled here and ``missing()`` what cannot, with the reason.  The packages are
optional: ``pip install '.[peers]'``.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

#: Peers without kernels to compile here -> why.
UNAVAILABLE = {
    "segment-anything-fast": "not compiled: PyTorch's package is not on PyPI, where another project has that name",
}

#: Compute capability that TorchInductor is told of; for AMD, whose tile table is another, Hopper's.
_CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0), "gfx942": (9, 0)}

#: As Triton does by default up to 3.9, and TorchInductor always.
_FUSION = {"enable_fp_fusion": True}


@dataclass
class Launch:
    """One kernel of a peer: see ``gpu_code.py``."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    tile: str
    loops: int = 1


@dataclass
class ScoreLaunch(Launch):
    scores_per_tile: int = 0


@dataclass
class ByteLaunch(Launch):
    bytes_per_tile: int = 0


def cases(arch: str) -> Iterator[tuple[str, str, Any]]:
    """(peer, case, launch) of every kernel that can be compiled here."""
    yield from (("FlexAttention", *case) for case in flex_attention(arch))
    if _installed("fla"):
        yield from (("flash-linear-attention", *case) for case in fla_attention_residual())
    if _installed("liger_kernel"):
        yield from (("Liger", *case) for case in liger_attention_residual())


def missing() -> dict[str, str]:
    """Peers that are not compiled here -> why."""
    packages = {"fla": "fla-core", "liger_kernel": "liger-kernel"}
    found = {
        name: f"not compiled: not installed (pip install {name})"
        for module, name in packages.items()
        if not _installed(module)
    }
    return found | UNAVAILABLE


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# --- FlexAttention ----------------------------------------------------------------------------------------------------

#: Case of ``rel_attention_2d`` -> (batch, heads, height, width, d_k, d_v).  FlexAttention wants depths of 16 and more.
_FLEX_SHAPES = {
    "aa-wrn stage 1": (8, 8, 32, 32, 20, 16),
    "sam global 64x64": (1, 12, 64, 64, 64, 64),
}


def flex_attention(arch: str) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of the forward and backward kernels that TorchInductor writes for captured row and column logits.

    The graphs are traced on fake CPU tensors, moved to a fake GPU of the target's compute capability and lowered by
    TorchInductor as they would be there: its own tile table chooses the tile.
    """
    for case, shape in _FLEX_SHAPES.items():
        for source in _inductor_sources(shape, _CAPABILITIES[arch]):
            for name, text in re.findall(r"async_compile\.triton\('(triton_tem_\w+)', '''(.*?)'''", source, re.DOTALL):
                yield case, _inductor_launch(name, text)


def _inductor_launch(name: str, text: str) -> ScoreLaunch:
    decorator, body = re.search(r"(@triton_heuristics\.template\(.*?)(@triton\.jit.*)", text, re.DOTALL).groups()
    signature = ast.literal_eval(re.search(r"'signature': (\{.*?\})", decorator).group(1))
    kinds = {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "i32": torch.int32,
        "i64": torch.int64,
    }
    arguments = {key: torch.empty(1, dtype=kinds[kind.strip("*")], device="meta") for key, kind in signature.items()}
    block = {key: int(size) for key, size in re.findall(r"(BLOCK_[MN]\d?) : tl\.constexpr = (\d+)", body)}
    if "BLOCK_M" in block:
        tile, scores, loops = f"{block['BLOCK_M']} x {block['BLOCK_N']}", block["BLOCK_M"] * block["BLOCK_N"], 1
    else:
        # One kernel makes dQ in blocks of M2 x N2 and dK, dV in blocks of M1 x N1: every score is computed twice.
        pair = (block["BLOCK_M1"] * block["BLOCK_N1"], block["BLOCK_M2"] * block["BLOCK_N2"])
        tile = f"{block['BLOCK_M1']} x {block['BLOCK_N1']} and {block['BLOCK_M2']} x {block['BLOCK_N2']}"
        scores, loops = sum(pair) // 2, 2
    options = {
        key: int(re.search(rf"{key}=(\d+)", decorator).group(1)) for key in ("num_warps", "num_stages")
    } | _FUSION
    header = text[: text.index("@triton_heuristics")]
    kernel = getattr(_load_source(name, header + body), name)
    return ScoreLaunch(kernel, arguments, options, tile, loops, scores_per_tile=scores)


def _load_source(name: str, text: str) -> types.ModuleType:
    """Import generated source; Triton reads it back from a file."""
    path = Path(tempfile.mkdtemp(prefix="fused-attn-peers-")) / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def _inductor_sources(shape: tuple[int, ...], capability: tuple[int, int]) -> tuple[str, ...]:
    """What TorchInductor writes for the forward and the backward graph."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import flex_attention as flex

    batch, heads, height, width, d_k, d_v = shape
    graphs = []

    def keep(graph, inputs):
        graphs.append((graph, list(inputs)))
        return make_boxed_func(graph.forward)

    def attention(query, key, value, row, col):
        def score_mod(score, b, h, q, k):
            return score + row[b, h, q, k // width] + col[b, h, q, k % width]

        return flex.flex_attention(query, key, value, score_mod=score_mod, scale=d_k**-0.5)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
    depths = (d_k, d_k, d_v, height, width)
    # PyTorch refuses the backward pass on the CPU; only its trace is wanted here.
    with mock.patch.object(flex, "_validate_device"), FakeTensorMode(allow_non_fake_inputs=True):
        leaves = [
            torch.empty(batch, heads, height * width, depth, dtype=torch.bfloat16, requires_grad=True)
            for depth in depths
        ]
        torch._dynamo.reset()
        out = torch.compile(attention, fullgraph=True, dynamic=False, backend=backend)(*leaves)
        torch.autograd.grad(out.sum(), leaves)
        torch._dynamo.reset()
    with _pretended_gpu(capability):
        return tuple(_lower(graph, inputs) for graph, inputs in graphs)


def _lower(graph: torch.fx.GraphModule, inputs: list[Any]) -> str:
    from torch._guards import TracingContext, tracing
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import _pytree as pytree

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def moved(value):
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    with mode:
        inputs = [moved(value) for value in inputs]
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                for node in module.graph.nodes:
                    if node.kwargs.get("device") is not None:
                        node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
                    node.meta.pop("tensor_meta", None)
                    if "val" in node.meta:
                        node.meta["val"] = pytree.tree_map(moved, node.meta["val"])
                module.recompile()
    with V.set_fake_mode(mode), tracing(TracingContext(mode)):
        lowering = GraphLowering(graph, example_inputs=inputs)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            code = lowering.codegen()[0]
    return getattr(code, "value", code)


@contextlib.contextmanager
def _pretended_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """TorchInductor asks the driver about the GPU; it gets the answers of one that is not there."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config, scheduler
    from torch.utils import _triton

    optin = {8: 166912, 9: 232448, 10: 232448}[capability[0]]
    properties = types.SimpleNamespace(
        name="not there", major=capability[0], minor=capability[1], multi_processor_count=132, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        total_memory=2**36, L2_cache_size=50 * 2**20, gcnArchName="", shared_memory_per_block=49152,
        shared_memory_per_block_optin=optin, shared_memory_per_multiprocessor=optin + 1024,
    )  # fmt: skip
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties,
        "get_device_capability": capability, "is_tf32_supported": True, "is_bf16_supported": True,
    }  # fmt: skip
    interface = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties,
        "get_compute_capability": capability[0] * 10 + capability[1], "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }  # fmt: skip

    def always(answer):
        return lambda *_, **__: answer

    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, always(answer)))
        for name, answer in interface.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(always(answer))))
        for name in ("current_device", "get_device_properties"):
            patch = mock.patch.object(CudaInterface.Worker, name, staticmethod(always(interface[name])))
            stack.enter_context(patch)
        stack.enter_context(mock.patch.object(_triton, "triton_hash_with_backend", always("none")))
        for module in (_triton, scheduler):
            stack.enter_context(mock.patch.object(module, "has_triton", always(True)))
        stack.enter_context(config.patch(compile_threads=1, force_disable_caches=True))
        yield


# --- attention residuals ----------------------------------------------------------------------------------------------

_SOURCES, _TOKENS, _WIDTH = 9, 8192, 7168


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def fla_attention_residual() -> Iterator[tuple[str, ByteLaunch]]:
    """flash-linear-attention's forward and dV kernels at L=9, N=8,192, D=7,168, bfloat16.

    Its autotuner would choose among tiles of 1, 2, 4 and 8 sources, 4 to 16 warps and 2 or 3 stages on the GPU; two of
    them are compiled.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        from fla.ops.attnres import fused

    tokens = _meta(_TOKENS, _WIDTH)
    statistics, total = _meta(_SOURCES, _TOKENS, dtype=torch.float32), _meta(_TOKENS, dtype=torch.float32)
    padded = 16  # its tuple of sources has a power of two of entries
    common = {
        "q": _meta(_WIDTH), "res": (tokens,) * padded, "w": _meta(_WIDTH), "ow": None, "o_pre": tokens,
        "rstd": statistics, "logit": statistics, "lse": total, "N": _TOKENS, "L": _SOURCES, "L2": padded, "D": _WIDTH,
        "eps": 1e-6, "scale": 1.0, "BD": 8192, "HAS_ONORM": False, "SAVE_OPRE": True,
    }  # fmt: skip
    gradients = {"do": tokens, "dres": (tokens,) * padded, "dqw": _meta(_TOKENS, _WIDTH, dtype=torch.float32)}
    gradients["dow_partial"] = None
    for sources in (1, 4):
        options = {"num_warps": 8, "num_stages": 2, **_FUSION}
        case, tile = f"L=9 N=8192 D=7168, {sources} at a time", f"{sources} x 8192"
        for wrapped, arguments, passes in (
            (fused.attnres_fwd_kernel, common | {"o": tokens}, 1),
            (fused.attnres_bwd_kernel_dv, common | gradients, 2),
        ):
            arguments = arguments | {"BL": sources}
            yield (
                case,
                ByteLaunch(_jit(wrapped), arguments, options, tile, bytes_per_tile=passes * sources * _WIDTH * 2),
            )


def liger_attention_residual() -> Iterator[tuple[str, ByteLaunch]]:
    """Liger's kernels at D=7,168, bfloat16, for 16 sources, which fill its unrolled loops; one program is one token."""
    from liger_kernel.ops import attn_res

    sources = 16
    stacked, tokens = _meta(sources, _TOKENS, _WIDTH), _meta(_TOKENS, _WIDTH)
    weights, statistics = _meta(_WIDTH), _meta(_TOKENS, sources, dtype=torch.float32)
    total = _meta(_WIDTH, dtype=torch.float32)
    sizes = {"n_blocks": sources, "n_tokens": _TOKENS, "D": _WIDTH, "eps": 1e-6, "BLOCK_D": 8192, "MAX_BLOCKS": sources}
    common = {
        "V_ptr": stacked, "W_query_ptr": weights, "W_norm_ptr": weights, "Alpha_ptr": statistics,
        "RSTD_ptr": statistics, **sizes,
    }  # fmt: skip
    gradients = {"dOut_ptr": tokens, "dV_ptr": stacked, "dW_query_ptr": total, "dW_norm_ptr": total}
    options, tile, row = {"num_warps": 16, "num_stages": 3, **_FUSION}, "16 x 8192", _WIDTH * 2
    for kernel, arguments, rows in (
        (attn_res._attn_res_fwd_kernel, common | {"Out_ptr": tokens}, sources + 1),
        (attn_res._attn_res_bwd_kernel, common | gradients, 2 * sources + 1),
    ):
        yield "L=16 N=8192 D=7168", ByteLaunch(_jit(kernel), arguments, options, tile, bytes_per_tile=rows * row)


def _jit(kernel: Any) -> Any:
    """The function inside autotuners and heuristics."""
    while not hasattr(kernel, "params"):
        kernel = kernel.fn
    return kernel
