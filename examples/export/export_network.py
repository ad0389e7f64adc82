"""Compile a network ahead of time for C++: plain PyTorch inside, nothing of fused-attn.

python examples/export/export_network.py network.pt2
"""

import argparse

import torch

import fused_attn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", help="file to write, ending in .pt2")
    parser.add_argument("--batch", type=int, default=2, help="images of the output that is printed")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = fused_attn.create_model("aa_wrn_10_1", impl="auto").eval()
    images = torch.linspace(-1, 1, options.batch * 3 * 32 * 32).view(-1, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    with fused_attn.export_mode(), torch.no_grad():
        program = torch.export.export(network, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    torch._inductor.aoti_compile_and_package(program, package_path=options.package)
    with torch.no_grad():
        print(network(images))  # by the kernels of fused-attn


if __name__ == "__main__":
    main()
