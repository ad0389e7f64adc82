"""What each of two processes does in tests/ops/test_elementwise_norm.py: started processes import no test file."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from fused_attn.modules import ElementwiseAttention


def draw(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def build(impl="auto", **options):
    torch.manual_seed(0)
    return ElementwiseAttention(2, (5, 6), 3, std=1.0, impl=impl, **options)


class GlooBatchNorm(nn.BatchNorm2d):
    """What SyncBatchNorm does on accelerators, for CPU tensors, which it refuses; momentum 1."""

    def forward(self, x):
        count = torch.tensor(float(x.numel() // x.shape[1]))
        count, total = all_reduce(count), all_reduce(x.sum((0, 2, 3)))
        mean = total / count
        var = all_reduce((x - mean.view(-1, 1, 1)).square().sum((0, 2, 3))) / count
        self.running_mean.copy_(mean.detach())
        self.running_var.copy_(var.detach() * count / (count - 1))
        return (x - mean.view(-1, 1, 1)) / (var + self.eps).sqrt().view(-1, 1, 1)


def step(rank, folder):
    """One of two processes: gradients and statistics of its half of the batch, written by the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        x = draw(6, 2, 5, 6)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(build())
        try:
            converted(x[rank::2])
            refusal = "none"
        except ValueError as error:
            refusal = str(error)
        module = build()
        module.norm = GlooBatchNorm(6, affine=False)
        replica = DistributedDataParallel(module)  # what hooks its gradients must outlive the forward pass
        replica(x[rank::2]).square().sum().backward()
        if rank == 0:
            state = {name: value.grad for name, value in module.named_parameters()} | dict(module.named_buffers())
            torch.save((refusal, state), f"{folder}/state")
        dist.barrier()
    finally:
        dist.destroy_process_group()
