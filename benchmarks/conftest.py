"""Settings of ``pytest benchmarks``."""


def pytest_addoption(parser):
    group = parser.getgroup("fused-attn")
    group.addoption("--threads", type=int, default=None, help="CPU threads of PyTorch; its own choice when not given")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the cases run (cpu)")
    group.addoption("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="of all tensors (fp32)")
