"""A step that comes again and again, launched as one CUDA graph.

One new position of a 16-layer model is some 300 short kernels. A GPU runs them faster than Python launches them; a CUDA graph is the list
of these launches, recorded once and given to the GPU as one. What it holds are addresses and numbers, so whatever differs from step to step
must lie in memory that stays where it is: the step's inputs, which are copied to one place, and the cache with its counts of columns.

The first call runs as it is: it compiles kernels, makes the cache's buffers and autocast's copies of the weights. The second is recorded and
replayed, the others are replays. A graph serves the steps of one batch, so nothing in it can be out of date; recording costs about as much
as a step without it.

    MINATP_GRAPHS=0        launches every kernel by itself, to find a fault
"""
import os
from contextlib import suppress

import torch

held = {}  # device -> (the stream for recording, the last graph, whose pool of memory the next one takes over: only the last is ever replayed)
SPARE = 2**28  # bytes: a recording cannot have what PyTorch keeps for later, so that much should be free of it


def serves(device):
    """Whether steps on this device are recorded."""
    return device.type == "cuda" and os.environ.get("MINATP_GRAPHS") != "0"


def record(work, device):
    """(graph, result) of work(), which is recorded and not run: `result` holds nothing before the first replay()."""
    stream, last = held.get(device) or (torch.cuda.Stream(device), None)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    if torch.cuda.mem_get_info(device)[0] < SPARE:
        torch.cuda.empty_cache()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=last and last.pool(), capture_error_mode="thread_local")  # other threads are NCCL's
        try:
            result = work()
        except BaseException:
            held.pop(device, None)
            with suppress(RuntimeError):  # it says again that something went wrong
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    held[device] = stream, graph
    return graph, result


class Replayed:
    """A function of tensors whose calls, from the third on, are replays. Its result is overwritten by the next call."""
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
