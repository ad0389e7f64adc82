"""``measure.peak_extra_bytes``, each measurement in a process that has imported what it needs and done nothing else."""

import gc

import fork_server
import torch

from fused_attn.bench import measure


def peak_extra_bytes(op: str, shape: str, impl: str, *, device: str = "cpu") -> int:
    """Most bytes held beyond the inputs while ``impl`` runs forward and backward once, in float32."""
    arguments = [op, shape, impl, device, "float32", str(torch.get_num_threads())]
    result = fork_server.ask(__file__, measure.child_environment(), arguments)
    if "reason" in result:
        raise NotImplementedError(result["reason"])
    if "error" in result:
        raise RuntimeError(f"the memory of {impl} on {op}, {shape} could not be measured: {result['error']}")
    return result["both"]


if __name__ == "__main__":
    # The first backward pass imports it, with SymPy, in half a second; every full collection takes a quarter.
    import torch.fx.experimental.symbolic_shapes

    from fused_attn.ops import SPECS  # noqa: F401

    gc.collect()
    gc.freeze()
    fork_server.serve(measure.main)
    gc.unfreeze()
