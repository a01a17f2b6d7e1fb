"""The device: which one, in which precision, and what happens when its memory runs out."""

import os
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch

from kernels import ops
from kernels.common import is_out_of_memory

from . import distributed
from .errors import OutOfMemory, UserError

# A model with fewer gets one thread of the CPU, see `place`
SMALL = 10**7  # parameters


def pick_device(name):
    """The torch.device of --device. Raises UserError if this machine has no such device."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(
            f"command line: --device {name!r} is not a device; give cpu, cuda or cuda:N"
        ) from None

    # PyTorch knows other devices, such as mps, which this code does not support
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"command line: --device {name!r} is not supported; give cpu, cuda or cuda:N"
        )

    # Refuse an impossible MINATP_KERNELS here, not at the first kernel
    try:
        ops.use_triton(device)
    except ops.Unavailable as e:
        raise UserError(f"environment: {e}") from None
    if device.type == "cuda":
        check_gpu(device, name)
    return device


def check_gpu(device, name):
    """Raise UserError if PyTorch does not see this GPU; set what it needs otherwise."""
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"command line: --device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    # cuDNN's attention makes a plan for every shape, and shapes change here with every batch
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Triton launches on the current device, wherever the tensors are. Several ranks each set their
    # own later (distributed.start)
    if device.index is not None and distributed.n_started() == 1:
        torch.cuda.set_device(device)


def place(model, device):
    """Move a model to its device; returns it.

    A small model on a CPU gets one thread, unless OMP_NUM_THREADS says otherwise: in such small
    products two threads wait for each other longer than they save, and on a busy machine several
    times longer.
    """
    n_parameter = sum(p.numel() for p in model.parameters())
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and n_parameter < SMALL:
        torch.set_num_threads(1)
    return model.to(device)


def autocast(device):
    """bf16 compute over float32 weights on a GPU; nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


class Doing(NamedTuple):
    """What is being computed, for the message if it does not fit into memory."""

    what: str
    batch: int
    length: int  # tokens
    option: str  # to lower


@contextmanager
def memory_guard(doing):
    """Turn a failed allocation, on a GPU or a CPU, into OutOfMemory.

    doing: a function that returns the current Doing.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        # a RuntimeError can be anything: its type or message tells a failed allocation apart
        if not is_out_of_memory(e):
            raise
        # ask only here, because what is being computed changes while the guard is open
        what, batch, length, option = doing()
        raise OutOfMemory(
            f"{what}: out of memory with a batch of {batch} × {length} tokens: lower {option}"
        ) from e


def solving_guard(
    prompts, model, max_new, batch_size=500, option="--problems or --max-new", what="evaluation"
):
    """`memory_guard` around solving all prompts (lists of ids) in batches of batch_size."""
    # The longest row: the prompt, all latents, <|end-latent|> and the answer
    length = max(map(len, prompts)) + model.c * model.K + 1 + max_new
    doing = Doing(what, min(batch_size, len(prompts)), length, option)
    return memory_guard(lambda: doing)
