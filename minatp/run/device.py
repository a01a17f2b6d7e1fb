"""The device: which one, in which precision, and what happens when its memory runs out."""

import os
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch

from kernels import ops
from kernels.common import is_out_of_memory

from . import distributed
from .build import n_parameters
from .errors import OutOfMemory, UserError

# A model with fewer gets one thread of the CPU and float32, see `place` and `pick_dtype`
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
    is_small = n_parameters(model) < SMALL
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and is_small:
        torch.set_num_threads(1)
    return model.to(device)


def pick_dtype(name, device, model):
    """The --dtype of a model on a device: `name`, if it is given, or what is fastest."""
    if name:
        return name
    if device.type == "cuda":
        return "bfloat16"

    # On a CPU the casts of a small model take longer than its products
    is_large = n_parameters(model) >= SMALL
    return "bfloat16" if is_large and multiplies_bfloat16() else "float32"


def multiplies_bfloat16():
    """Whether this CPU has instructions for products in bfloat16: AVX512_BF16 or AMX."""
    # PyTorch has no public function for it: one that lacks these answers no
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def autocast(device, dtype=""):
    """A context in which products are computed in `dtype`, a choice of --dtype.

    Weights stay float32, and losses, KL and log-probabilities are computed in float32. (Without the
    kernels the logits that these begin with are a product in `dtype`.) "": bfloat16 on a GPU,
    float32 on a CPU.
    """
    if dtype == "float32" or (not dtype and device.type == "cpu"):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


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
