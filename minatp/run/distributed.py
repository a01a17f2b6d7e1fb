"""Several GPUs and machines through torchrun: each process works on its rows of every batch, and the gradients are summed.

    torchrun --nproc-per-node 8 train.py --stage sft …

Losses are divided by counts of the whole batch and every row has its own noise, so that the sum over processes is the gradient
that one process computes. Without torchrun every function here does nothing. Rank 0 alone writes (Log, run.say, checkpoints).
"""
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from .errors import UserError

BUCKET = 2**24  # gradient elements that travel together


def start(device):
    """Join the processes that torchrun started; returns this one's device, the GPU of its local rank. `device` where there are none."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"command line: process {device.index} of this machine has no GPU of its own; start torchrun with "
                            f"--nproc-per-node {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def check_batch_size(batch_size):
    """Raises UserError where a batch cannot be shared out evenly."""
    if batch_size % world_size():
        raise UserError(f"command line: --batch-size {batch_size} must be a multiple of the {world_size()} processes")


def shard(rows):
    """This process's share of a list or of a tensor's rows: every world-th, so that shares of a sorted list are alike."""
    return rows[rank()::world_size()]


def all_reduce(values, device):
    """{name: number or scalar tensor}, summed over the processes; a process may lack some names. Numbers come back as numbers."""
    if world_size() == 1:
        return values
    shares = [None] * world_size()
    dist.all_gather_object(shares, {k: type(v) for k, v in values.items()})
    kinds = {k: kind for share in shares for k, kind in share.items()}
    summed = torch.stack([torch.as_tensor(values.get(k, 0), dtype=torch.float64).detach().to(device) for k in kinds])
    dist.all_reduce(summed)
    return {k: s if kind is torch.Tensor else kind(s) for (k, kind), s in zip(kinds.items(), summed)}


def weighted_mean(values, weight, device):
    """{name: scalar tensor}, averaged over the processes with their weights; where the weight is 0 there may be no values."""
    if world_size() == 1:
        return values
    summed = all_reduce({**{k: v * weight for k, v in values.items()}, "weight": weight}, device)
    n = summed.pop("weight")
    return {k: v / max(1, n) for k, v in summed.items()}


def all_gather(rows):
    """The tensor whose rows `mine` shared out, from everyone's share."""
    if world_size() == 1:
        return rows
    shares = [None] * world_size()
    dist.all_gather_object(shares, rows.cpu())
    return torch.stack(shares, 1).flatten(0, 1).to(rows.device)


def broadcast(value):
    """Rank 0's value, for all."""
    if world_size() == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def any_rank(flag, device):
    """Whether the flag is up in any process."""
    return bool(all_reduce({"up": int(flag)}, device)["up"])


def merge(found):
    """Lists of equal length in which each process filled in some entries, the others being None -> one list without gaps."""
    if world_size() == 1:
        return found
    shares = [None] * world_size()
    dist.all_gather_object(shares, [(i, f) for i, f in enumerate(found) if f is not None])
    for share in shares:
        for i, f in share:
            found[i] = f
    return found


def all_reduce_gradients(model):
    """Every parameter's gradient becomes the sum over the processes; None stays None where it is None for all."""
    if world_size() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    bucket, size = [], 0
    for p, any_has in zip(parameters, there.tolist()):
        if any_has:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            bucket.append(p.grad)
            size += p.numel()
        if size >= BUCKET:
            all_reduce_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        all_reduce_bucket(bucket)


def all_reduce_bucket(tensors):
    """all_reduce of a few tensors, in place, as one."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(part.view_as(t))
