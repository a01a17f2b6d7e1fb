"""Several GPUs and machines: each rank works on its rows of every batch; gradients are summed.

    torchrun --nproc-per-node 8 train.py --stage sft …

Losses are divided by counts of the whole batch, and every row has noise of its own. So the sum over
the ranks is the gradient that a single process would compute. Without torchrun there is one rank,
and each function here returns its argument. Only rank 0 writes files and stdout.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from .errors import UserError

BUCKET = 2**24  # gradient elements that are sent together

RANK, WORLD_SIZE = 0, 1  # this process's number, and how many there are; `start` sets them

# ---- ranks ---------------------------------------------------------------------------------------


def n_started():
    """How many processes torchrun has started: its WORLD_SIZE. 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device):
    """Join the processes that torchrun has started. Returns the device of this rank.

    That is `device`, or with several GPUs the one that belongs to this rank. Raises UserError if
    this machine has more ranks than GPUs.
    """
    global RANK, WORLD_SIZE

    # Nobody to join
    if n_started() == 1:
        return device

    # NCCL needs a GPU for each rank, here by its number on this machine. What is on a CPU goes by
    # gloo, and does not wait for what a GPU still computes
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        n_gpu = torch.cuda.device_count()
        if device.index >= n_gpu:
            raise UserError(
                f"command line: process {device.index} of this machine has no GPU of its own; "
                f"start torchrun with --nproc-per-node {n_gpu}"
            )
        torch.cuda.set_device(device)

    # The other ranks wait while rank 0 writes a checkpoint, hence so long a timeout
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    RANK, WORLD_SIZE = dist.get_rank(), dist.get_world_size()
    return device


def stop():
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_batch_size(batch_size):
    """Raise UserError if a batch cannot be split evenly among the ranks."""
    if batch_size % WORLD_SIZE:
        raise UserError(
            f"command line: --batch-size {batch_size} must be a multiple of the {WORLD_SIZE} "
            "processes"
        )


# ---- rows ----------------------------------------------------------------------------------------


def shard(rows):
    """This rank's share of a list or of a tensor's rows: every WORLD_SIZE-th one.

    Neighbours go to different ranks, so shares of rows sorted by length take similar time.
    """
    return rows[RANK::WORLD_SIZE]


def all_gather(rows):
    """The tensor that `shard` has shared out, on all ranks. rows: this rank's share."""
    if WORLD_SIZE == 1:
        return rows

    # Row i of rank r is row i·WORLD_SIZE + r of the whole
    shares = gather_objects(rows.cpu())
    return torch.stack(shares, 1).flatten(0, 1).to(rows.device)


def merge(rows):
    """Merge lists of equal length, one per rank. Each entry is None on all ranks but one."""
    if WORLD_SIZE == 1:
        return rows

    # Send only what this rank has filled, with its place in the list
    shares = gather_objects([(i, row) for i, row in enumerate(rows) if row is not None])
    for share in shares:
        for i, row in share:
            rows[i] = row
    return rows


def gather_objects(value):
    """[the value of each rank], anything that can be pickled."""
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


# ---- numbers -------------------------------------------------------------------------------------


def all_reduce(values, device, weight=None):
    """{name: number or scalar tensor}, summed over the ranks. Numbers come back as numbers.

    weight: average instead, by the weight of each rank. A rank may lack some names.
    """
    if WORLD_SIZE == 1:
        return values

    # A weighted mean: sum value·weight and the weights, and divide. (The weights stay on the CPU)
    if weight is not None:
        summed = all_reduce({name: value * weight for name, value in values.items()}, device)
        total_weight = max(1, all_reduce({"weight": weight}, device)["weight"])
        return {name: value / total_weight for name, value in summed.items()}

    # The names of all ranks, in the same order on each
    types = {}
    for share in gather_objects({name: type(value) for name, value in values.items()}):
        types |= share

    if not types:
        return {}

    # One message for all, in float64, which holds counts exactly. Without a tensor it stays on the
    # CPU: the host would have to wait for a GPU
    if torch.Tensor not in types.values():
        device = "cpu"
    numbers = []
    for name in types:
        number = torch.as_tensor(values.get(name, 0), dtype=torch.float64)
        numbers.append(number.detach().to(device))
    totals = torch.stack(numbers)
    dist.all_reduce(totals)

    # Back to the types that came in: counts are ints again
    summed = {}
    for (name, kind), total in zip(types.items(), totals):
        summed[name] = total if kind is torch.Tensor else kind(total)
    return summed


def broadcast(value):
    """Rank 0's value, on all ranks."""
    if WORLD_SIZE == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


# ---- gradients -----------------------------------------------------------------------------------


def all_reduce_gradients(model):
    """Sum every parameter's gradient over the ranks. It stays None if it is None on all of them."""
    if WORLD_SIZE == 1:
        return

    # A rank may lack a gradient that others have: RL may leave it without an informative group
    parameters = [p for p in model.parameters() if p.requires_grad]
    has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(has_gradient, dist.ReduceOp.MAX)

    # Few large messages are faster than many small ones
    bucket, size = [], 0
    for p, any_has in zip(parameters, has_gradient.tolist()):
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
    """Sum each of some tensors over the ranks, in place, in one message."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    for t, part in zip(tensors, parts):
        t.copy_(part.view_as(t))
