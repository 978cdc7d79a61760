"""Two processes train one model, by DistributedDataParallel and by FSDP2, as a single process would.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py

Each process has half of every batch. DDP keeps the whole model in each and averages the gradients; FSDP2 keeps half of
each block's weights in each and gathers them for the moment in which the block runs. The fused modules need nothing for
either. All three end with the same losses.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from shared import Scans, accuracy, digits, ops_of, started, steps
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vitkernels as vk

BATCH, COMPARED = 64, 20  # steps of which the losses are held against one process's


def build() -> vk.nn.VisionTransformer:
    """The same weights in every process."""
    torch.manual_seed(0)
    model = vk.nn.VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=2,
        num_heads=4,
        mean=(0.3,),
        std=(0.4,),
    )
    return started(model)


def ddp() -> nn.Module:
    """Whole in each process."""
    return DistributedDataParallel(build())


def fsdp() -> nn.Module:
    """Sharded block by block, then what is left."""
    model, mesh = build(), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, scans: Scans, steps: int, rank: int, processes: int) -> list[float]:
    """This process's part of each batch; the losses of the whole batches."""
    torch.manual_seed(1)  # all draw the same batches
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for images, labels in scans.batches(BATCH, steps):
        part = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
        loss = F.cross_entropy(model(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / processes
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def main(steps: int = 100) -> None:
    """Train three times, and compare."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    assert processes > 1, "needs two processes: torchrun --standalone --nproc-per-node 2 examples/distributed.py"
    scans, test = digits()
    alone = train(build(), scans, COMPARED, 0, 1)
    for name, make in (("DDP", ddp), ("FSDP2", fsdp)):
        model = make()
        with vk.record() as calls:
            losses = train(model, scans, steps, rank, processes)
        assert {"patch_embed", "attention_qkv", "add_layer_norm", "mlp"} <= {call.op for call in calls}
        with torch.no_grad():
            right = accuracy(model.eval()(test.images), test.labels)
        apart = max(abs(one - other) for one, other in zip(losses, alone, strict=False))
        if rank == 0:
            print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, {right:.1%} right on held-out scans")
            print(f"  in its first {COMPARED} steps {apart:.0e} from one process's; ran: {ops_of(calls)}")
        assert apart < 1e-3, "it is not the training of one process"
        assert right > 0.75, "it did not learn"
    dist.destroy_process_group()


if __name__ == "__main__":
    main(steps(__doc__, default=100))
