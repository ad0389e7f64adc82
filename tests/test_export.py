"""Graphs that PyTorch's exporters make of the ops and networks compute what they compute."""

import io

import pytest
import torch
from commands import python
from model_checks import MODELS, build, images, randomise_norms
from torch import nn
from torch.export import Dim
from torch.fx import symbolic_trace
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn
from fused_attn import export_mode, modules
from fused_attn.models import list_models
from fused_attn.ops import SPECS
from fused_attn.ops._floor.declarations import tensors, with_tensors
from fused_attn.ops._floor.tracing import leaf

#: One label of tests/model_checks.py for every family with ops.
FAMILIES = ["aa_wrn", "sa_resnet20", "mrla_base_deit", "mrla_light_deit", "se", "attention_wise", "swin", "coatnet"]
needs_cpu = pytest.mark.skipif(
    not fused_attn._extension.available(), reason=f"no C++ kernels: {fused_attn._extension.reason()}"
)


class Call(nn.Module):
    """An op's call as a function of its tensors."""

    def __init__(self, spec, impl="auto"):
        super().__init__()
        self.spec, self.impl = spec, impl
        self.inputs = next(sample for sample in spec.samples if sample.small).inputs(torch.float32)
        self.args = tuple(tensors(self.inputs).values())

    def forward(self, *args):
        inputs = with_tensors(self.inputs, dict(zip(tensors(self.inputs), args, strict=True)))
        return self.spec.function(**inputs, impl=self.impl)


def network(label):
    return randomise_norms(build(label)).eval()


def draw(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


def check(found, expected, tolerance=0.0):
    found, expected = ([value] if isinstance(value, torch.Tensor) else [*value] for value in (found, expected))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.detach().abs().max()))


def own(graph):
    """Nodes of the package's operators and functions."""
    return [node for node in graph.nodes if "fused_attn" in str(node.target) + getattr(node.target, "__module__", "")]


# --- torch.export -------------------------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_ops(spec):
    call = Call(spec, "cpu")
    expected = call(*call.args)
    program = torch.export.export(call, call.args)
    assert next(str(node.target) for node in own(program.graph)).endswith("_cpu.default")
    check(program.module()(*call.args), expected)
    with export_mode():
        program = torch.export.export(call, call.args)
        within = call(*call.args)
    assert not own(program.graph)
    check(program.module()(*call.args), within)
    check(within, Call(spec, "reference")(*call.args))
    torch.testing.assert_close(within, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("label", FAMILIES[:-1])
def test_networks_of_any_batch(label):
    model = network(label)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: Dim("batch")},), strict=label == "aa_wrn")
    assert own(program.graph)
    x = draw(5, 3, 16, 16)
    with torch.no_grad():
        check(program.module()(x), model(x), 1e-6)


def test_networks_of_any_size():
    model = network("aa_wrn")
    sizes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    program = torch.export.export(model, (images(),), dynamic_shapes=(sizes,)).module()
    x = draw(3, 3, 12, 10)
    with torch.no_grad():
        check(program(x), model(x), 1e-6)
    with pytest.raises(AssertionError, match="Guard failed"):  # larger than the tables
        program(draw(3, 3, 20, 16))


# --- the export mode ----------------------------------------------------------------------------------------------


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def test_the_mode_ends_with_its_block():
    call = Call(SPECS[0])

    def namespaces():
        with Names() as mode:
            call(*call.args)
        return mode.seen

    usual = namespaces()
    with export_mode():
        with pytest.raises(KeyError), export_mode():
            raise KeyError
        assert namespaces() == {"aten"}
        with pytest.raises(ValueError, match="impl must be one of"):
            Call(SPECS[0], "none")(*call.args)
    assert namespaces() == usual


def test_compiled_functions_follow_the_mode():
    call, outputs = Call(SPECS[0]), []

    def backend(graph, _):
        outputs.append({str(node.target) for node in graph.graph.nodes if "fused_attn" in str(node.target)})
        return graph

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    expected = compiled(*call.args)
    with export_mode():
        torch.testing.assert_close(compiled(*call.args), expected, rtol=1e-4, atol=1e-5)
    assert not outputs[-1]
    assert len(outputs) == 2
    torch._dynamo.reset()


# --- torch.fx -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", MODELS)
def test_symbolic_traces(label):
    model, x = network(label), images()
    traced = symbolic_trace(model)
    with torch.no_grad():
        check(traced(x), model(x))
    if label in FAMILIES:
        assert own(traced.graph)
        with pytest.raises((ValueError, RuntimeError)):
            traced(draw(2, 4, 16, 16))


@pytest.mark.parametrize("label", ["attention_wise", "aa_wrn"])
def test_symbolic_traces_train(label):
    model, other = build(label), build(label)
    traced = symbolic_trace(other.train())
    batches = {name: value.clone() for name, value in traced.named_buffers() if name.endswith("num_batches_tracked")}
    assert all(int(value) == 0 for value in batches.values())  # nothing ran while it was traced
    for net in (model.train(), traced):
        net(images()).square().sum().backward()
    found = dict(traced.named_buffers())
    for name, value in model.named_buffers():
        check(found[name], value, 1e-6)
    found = dict(traced.named_parameters())
    for name, value in model.named_parameters():
        check(found[name].grad, value.grad, 1e-5)


def test_every_name_is_traced():
    for name in list_models("*swin*") + list_models("*aa_resnet*") + list_models("mrla_light_resnet*"):
        with torch.device("meta"):
            model = fused_attn.create_model(name)
        assert own(symbolic_trace(model).graph), name


def test_modules_whose_layers_are_called_are_traced():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.se = modules.SqueezeExcite(8, 2)

        def forward(self, x):
            return self.se(x, residual=x, activation="relu")

    module, x = Residual(), draw(2, 8, 3, 3)
    module.se.fc1.register_forward_hook(lambda module, args, out: 2.0 * out)
    traced = symbolic_trace(module)
    assert "se.fc1" in {node.target for node in traced.graph.nodes}
    check(traced(x), module(x))
    grid = modules.GridAttention2d(8, 2, 2)
    check(symbolic_trace(grid)(draw(2, 8, 4, 6)), grid(draw(2, 8, 4, 6)))
    with pytest.raises(ValueError, match="multiples of grid"):
        symbolic_trace(grid)(draw(2, 8, 4, 5))


def test_proxies_are_found_in_lists_and_keywords():
    double = leaf(lambda values, factor=2.0: [factor * value for value in values])
    graph = symbolic_trace(lambda x, y: double([torch.ones(1), x], factor=y)[1])
    assert len([node for node in graph.graph.nodes if node.op == "call_function"]) == 2
    check(graph(torch.ones(1), 3.0), 3.0 * torch.ones(1))


# --- torch.jit.trace ----------------------------------------------------------------------------------------------


def traced_and_loaded(model, x):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x, check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)


@needs_cpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", ["aa_wrn", "mrla_base_deit", "attention_wise", "swin"])
def test_jit_traces(label):
    """Of any batch, with gradients; of another size, for which kernels would read wrong, there is an error."""
    model = network(label)
    traced = traced_and_loaded(model, images())
    x = draw(3, 3, 16, 16)
    check(traced(x), model(x))
    traced(x).sum().backward()
    found, expected = dict(traced.named_parameters()), torch.autograd.grad(model(x).sum(), [*model.parameters()])
    for (name, _), grad in zip(model.named_parameters(), expected, strict=True):
        check(found[name].grad, grad, 1e-5)
    for size in ((8, 32), (12, 20)):
        with pytest.raises(RuntimeError, match=r"multiply up|exceeds|narrow"):
            traced(draw(2, 3, *size))


@pytest.mark.filterwarnings("ignore")
def test_jit_traces_in_the_mode_hold_nothing_of_the_package():
    model = network("swin")
    with export_mode():
        traced = traced_and_loaded(model, images())
    assert "fused_attn::" not in str(traced.inlined_graph)
    with torch.no_grad():
        check(traced(images()), model(images()), 1e-5)


# --- ONNX and ahead of time -----------------------------------------------------------------------------------------


def test_calls_do_not_import_the_exporter():
    program = "import sys, torch, fused_attn; fused_attn.row_col_softmax(torch.ones(1, 1, 2, 2))"
    assert python("-c", f"{program}; print(any('onnx._internal' in name for name in sys.modules))").stdout == "False\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", ["aa_wrn", "mrla_light_deit", "swin"])
def test_onnx(host_packages, label):
    pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    model = network(label)
    program = torch.onnx.export(
        model, (images(),), dynamo=True, dynamic_shapes=({0: Dim("batch")},), verbose=False, optimize=label == "swin"
    )
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = draw(3, 3, 16, 16)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        check(torch.from_numpy(found), model(x), 1e-5)


@needs_cpu
@pytest.mark.filterwarnings("ignore")
def test_ahead_of_time(tmp_path):
    module = modules.SqueezeExcite(8, 2).eval()
    with torch.no_grad():
        program = torch.export.export(module, (draw(2, 8, 3, 3),), dynamic_shapes={"x": {0: Dim("batch")}})
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "module.pt2"))
        x = draw(5, 8, 3, 3)
        check(torch._inductor.aoti_load_package(package)(x), module(x))
