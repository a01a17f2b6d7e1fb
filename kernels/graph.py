"""A step that comes again and again, launched as one CUDA graph.

One new position of a 16-layer model is some 300 short kernels. A GPU runs them faster than Python launches them; a CUDA graph is the list
of these launches, recorded once and given to the GPU as one. What it holds are addresses and numbers, so whatever differs from step to step
must lie in memory that stays where it is: the step's inputs, which are copied to one place, the cache with its counts of columns, and what a
loop's step writes in place. A loop may put other tensors in place of its own only where the cache's `keep` begins a new recording.

The first call runs as it is: it compiles kernels, makes the cache's buffers and autocast's copies of the weights. The second is recorded and
replayed, the others are replays. A graph serves the steps of one batch, so nothing in it can be out of date; recording costs about as much
as a step without it.

All graphs are recorded on one stream and share one pool of memory: the next one writes where the last one did, and with the last one goes
cuBLAS's workspace of that stream. So a graph must have had its last replay, and what it left must have been read or copied, before the next
is recorded. Every loop here ends before another begins.

    MINATP_GRAPHS=0        no graphs, and the chain of latents is autograd's: to find a fault
"""
import os
from contextlib import suppress

import torch

from .common import is_out_of_memory

held = {}  # device -> (stream for recording, last graph or None). The next graph reuses the last one's memory


def serves(device):
    """Whether steps on this device are recorded."""
    return device.type == "cuda" and os.environ.get("MINATP_GRAPHS") != "0"


def record(work, device):
    """(graph, result) of work(), which is recorded and not run: `result` holds nothing before the first replay(). Tried once more where
    memory is lacking, PyTorch's or the driver's. Raises what says so (common.is_out_of_memory)."""
    try:
        return capture(work, device)
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
    torch.cuda.empty_cache()  # a recording cannot use the blocks that PyTorch's allocator holds in reserve
    return capture(work, device)


def capture(work, device):
    """`record`, tried once."""
    stream, last = held.pop(device, None) or (torch.cuda.Stream(device), None)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=last and last.pool(), capture_error_mode="thread_local")  # other threads are NCCL's
        try:
            result = work()
        except BaseException:
            with suppress(RuntimeError):  # ending a failed recording raises again
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    held[device] = stream, graph
    return graph, result


def release():
    """Let go of what is held for the next graph: after an evaluation, whose batches are larger than training's."""
    held.update({device: (stream, None) for device, (stream, _) in held.items()})  # another stream would have another workspace


# ---- what a loop needs whose steps are graphs: nothing in it may ask the device for a number --------------------------------

def some(mask, fixed):
    """Indices (n,) of the rows where mask (B,); of all rows where shapes are fixed: `put` then leaves the others as they were."""
    return torch.arange(len(mask), device=mask.device) if fixed else mask.nonzero()[:, 0]


def put(x, at, value, real):
    """x[at] = value where real (n,), in place. at: one index or several, each (n,), no place twice."""
    x[at] = torch.where(real.view(-1, *[1] * (value.dim() - 1)), value.to(x.dtype), x[at])


def left(done, n_done, fixed):
    """Indices of the rows to go on with, where n_done of done (B,) are known to be True; None: all rows. With fixed shapes a step costs about
    the same for fewer rows (it reads the weights) and must be recorded anew for them: so from half on."""
    if n_done >= (len(done) / 2 if fixed else 1):
        return done.long().argsort(stable=True)[: len(done) - n_done]


class Late:
    """How many are True, of a mask that only gains. late: the answer is that of the call before, so that the host launches a step and then
    waits for the one before it, and the GPU always has something to do."""
    def __init__(self, late):
        self.late, self.last = late, None

    def __call__(self, mask):
        n = mask.sum()
        if not self.late:
            return int(n)
        event = torch.cuda.Event() if n.is_cuda else None
        (last, before), self.last = self.last or (0, None), (n.to("cpu", non_blocking=True), event)
        if event:
            event.record()
        if before:
            before.synchronize()
        return int(last)


class Replayed:
    """A function of tensors: the first call runs, the second is recorded, and from the second on the result is a replay's, which the next
    call overwrites."""
    def __init__(self):
        self.inputs = self.graph = None

    def __call__(self, work, *inputs):
        """work(*inputs); the same `work` every time, on inputs of the same shapes."""
        if self.inputs is None:
            self.inputs = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
            return work(*self.inputs)
        for mine, x in zip(self.inputs, inputs):
            mine.copy_(x)
        if self.graph is None:
            self.graph, self.result = record(lambda: work(*self.inputs), inputs[0].device)
        self.graph.replay()
        return self.result
