"""Launches made again: what the compiled kernels get is what a planned launch gives them."""

import contextlib

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import jit  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from fused_attn.ops import SPECS  # noqa: E402
from fused_attn.ops._floor import dispatch, replay  # noqa: E402
from fused_attn.testing.numerics import draw_grad_out, evaluate  # noqa: E402

INDEX = 77  # of a GPU that no machine has: nothing finds what is "compiled" for it


class Device:
    """Stands for a GPU: what Triton asks of one before it launches."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return INDEX

    def get_current_stream(self, index=INDEX):
        return 0


class Kernel:
    """Stands for a compiled kernel; ``told`` gets its name, and the grid, addresses and numbers of every launch."""

    function, packed_metadata = 0, ()

    def __init__(self, name, told):
        self.name, self.told = name, told

    def launch_metadata(self, *arguments):
        return None

    def run(self, *arguments):
        grid, arguments = arguments[:3], arguments[9:]
        self.told.append([self.name, *grid, *flat(arguments)])


class Address(int):
    """Where a tensor begins."""


def flat(arguments):
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from flat(argument)
        else:
            yield Address(argument.data_ptr()) if isinstance(argument, torch.Tensor) else argument


@pytest.fixture
def told(monkeypatch):
    launches = []

    def compile_nothing(function, key, signature, device, *_):
        kernel = function.device_caches[device][0][key] = Kernel(function.fn.__name__, launches)
        return kernel

    monkeypatch.setattr(jit.JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(driver, "_active", Device())
    monkeypatch.setattr(dispatch, "triton_reason", lambda tensor: None)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(replay, "_seen", {})
    return launches


def same(again, planned, tensors):
    """Whether launches get the same, but for the addresses of scratch memory, which differ alike in all of them."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    inside = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
    scratch = {}
    for left, right in zip(again, planned, strict=True):
        for a, b in zip(left, right, strict=True):
            if isinstance(b, Address) and a != b:
                known = any(first <= address < last for first, last in inside for address in (a, b))
                if known or scratch.setdefault(b, a) != a:
                    return False
            elif a != b or (type(a) is not type(b) and not isinstance(b, Address)):
                return False
    return len({*scratch.values()}) == len(scratch)


@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if "triton" in spec.implementations], ids=lambda spec: spec.name
)
def test_launches_made_again_are_those_that_are_planned(spec, told, monkeypatch):
    made_again = set()
    run = replay._Call.run

    def compare(call, planner, args, tensors):
        del told[:]
        run(call, planner, args, tensors)
        again = told[:]
        if all(tensor.data_ptr() % 16 == 0 for tensor in tensors):
            assert call.programme is not None, planner.__name__
            made_again.add(planner.__name__)
            del told[:]
            for launch in replay._launches(planner, args):
                launch.run()
            assert same(again, told, tensors), planner.__name__

    monkeypatch.setattr(replay._Call, "run", compare)
    for sample in spec.samples:
        for draw in range(3):
            inputs = sample.inputs(torch.bfloat16, "cpu", draw)
            if spec.reason("triton", inputs) is None:
                evaluate(lambda **kw: spec.function(**kw, impl="triton"), inputs, draw_grad_out(spec, inputs))
    assert len(made_again) >= 2, made_again  # forward and backward


@pytest.mark.parametrize("sample", ["two blocks", "many images", "dual, two blocks", "dual, masks, small"])
def test_a_third_call_of_a_softmax_is_not_planned(sample, told):
    spec = next(spec for spec in SPECS if spec.name == "row_col_softmax")
    sample = next(one for one in spec.samples if one.name == sample)
    for draw in range(3):
        inputs = sample.inputs(torch.bfloat16, "cpu", draw)
        evaluate(lambda **kw: spec.function(**kw, impl="triton"), inputs, draw_grad_out(spec, inputs))
    assert [call.programme is not None for calls in replay._seen.values() for call in calls] == [True, True]
