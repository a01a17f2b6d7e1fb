"""A step that is repeated many times, launched as one CUDA graph.

One new position of a 16-layer model is some 300 short kernels. A GPU runs them faster than Python
can launch them. A CUDA graph is the list of these launches, recorded once and handed to the GPU as
a whole. It holds addresses and numbers, so whatever changes from step to step must lie in memory
that stays where it is: the step's inputs, which are copied to one place; the cache with its counts
of columns; and whatever else a step writes in place. A loop may replace its tensors by others only
where the cache's `keep` begins a new recording.

The first call of a step runs without a graph: it compiles kernels, allocates the cache's buffers
and makes autocast's copies of the weights. The second is recorded and replayed, and all later ones
are replays. A graph serves the steps of one batch, so nothing in it can be out of date. Recording
costs about as much as one step without a graph.

Graphs of one Place are recorded on one stream and share a pool of memory: what one no longer
needs, the next overwrites, and cuBLAS's workspace for that stream goes with the last of them. The
loops share a Place. So before the next recording a graph must have had its last replay, and its
results must have been read or copied: every loop ends before another begins. Graphs that are kept
(kernels/replayed_chain.py) have a Place of their own.

    MINATP_GRAPHS=0        use no graphs, and let autograd run the chain of latents: for debugging
"""

import os
from contextlib import suppress

import torch

from .common import is_out_of_memory

# Rows leave only a batch of at least so many. To record a step of llama-1b anew costs 22 ms of the
# host beside an H200 (kernels/RESULTS.md), and before that a step runs without a graph. By the
# model of time in minatp/bench/fake_gpu.py, half the rows save 0.07 ms a step of 128 rows, 0.44 of
# 256, 1.2 of 512 and 2.9 of 1,280: small batches mostly read weights. So with 1,024 rows it pays
# within the 16 to 24 words of an answer or a thought, and with 512 it does not
FEWEST_ROWS = 1024


class Place:
    """Where graphs are recorded."""

    def __init__(self):
        self.stream = None  # until the first recording
        self.forget_graphs()

    def forget_graphs(self):
        """The next graph has a pool of memory of its own. The stream stays: another would have a
        workspace of its own.
        """
        self.last_graph = None  # its pool is that of the next
        self.n_byte = 0  # of the pool


# the Place that all loops share
loops = Place()

# what holds graphs for later batches; the first to go if memory runs out
kept = {}


class CaptureFailed(BaseException):
    """A recording has failed, and not for want of memory.

    PyTorch's allocator may be left in the middle of the recording, so nothing more can be trusted
    in this process. It is no Exception, so that no handler of those goes on.
    """


def use_graphs(device):
    """Whether steps on this device are recorded."""
    return device.type == "cuda" and os.environ.get("MINATP_GRAPHS") != "0"


def record(work, place):
    """Record work() without running it; returns (graph, result). `result` is uninitialised until
    the first replay(). If memory runs out, PyTorch's or the driver's, retried once after freeing
    cached memory and kept graphs; a second failure is raised (common.is_out_of_memory). Raises
    CaptureFailed after any other.
    """
    for is_last in (False, True):
        try:
            return capture(work, place)
        except Exception as e:
            if not is_out_of_memory(e):
                raise CaptureFailed(f"{type(e).__name__} while recording: {e}") from e
            if is_last:
                raise
        # a recording cannot use the blocks that PyTorch's allocator keeps in reserve
        kept.clear()
        torch.cuda.empty_cache()


def capture(work, place):
    """One attempt of `record`."""
    stream = place.stream or torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()

    # the pool goes with the last graph that has it: `last` lives until this one has it, too
    last = place.last_graph

    # if this recording fails, the next begins with another stream and another pool
    place.stream = place.last_graph = None
    n_byte = torch.cuda.memory_reserved()

    # a stream of its own, because CUDA records no graph on the default one
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # thread_local: NCCL's threads may go on calling CUDA meanwhile
        graph.capture_begin(pool=last and last.pool(), capture_error_mode="thread_local")
        try:
            result = work()
        except BaseException:
            with suppress(RuntimeError):  # ending a failed recording raises once more
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    place.stream, place.last_graph = stream, graph
    place.n_byte += torch.cuda.memory_reserved() - n_byte
    return graph, result


def release_memory():
    """Free the memory that is held for the loops' next graph: call it after an evaluation, whose
    batches are larger than training's.
    """
    loops.forget_graphs()


# ---- for loops whose steps are graphs ------------------------------------------------------------
# Nothing in a recorded step may ask the device for a number, and shapes must not depend on data. So
# with fixed_shape a step computes every row, and a mask says which results count.


def rows_where(mask, fixed_shape):
    """Indices (n,) of the rows where mask (B,) is True; with fixed_shape, of all rows."""
    if fixed_shape:
        return torch.arange(len(mask), device=mask.device)
    return mask.nonzero()[:, 0]


def unfinished_rows(done, n_done, fixed_shape):
    """Indices of the rows to continue with, if n_done of done (B,) are known to be True. None: keep
    all rows.

    With fixed_shape, rows are dropped only from a large batch, when half of them are done: a step
    of fewer rows must be recorded anew (FEWEST_ROWS).
    """
    if fixed_shape and len(done) < FEWEST_ROWS:
        return None
    fewest = len(done) / 2 if fixed_shape else 1

    # finished rows are sorted to the end. A count that is one step late keeps a few of them, and
    # drops no row that is unfinished
    if n_done >= fewest:
        return done.long().argsort(stable=True)[: len(done) - n_done]
    return None


class DelayedCount:
    """Counts the True entries of a mask that only grows.

    delayed: only every `every`-th call waits for the device, and then for a count that the call
    before it has started, so the GPU always has work queued. The others return what is known.
    """

    def __init__(self, delayed, every=4):
        self.delayed, self.every = delayed, every
        self.n_call = 0
        self.started = 0, None  # a count on its way to the host, and the event after its copy
        self.known = 0  # never too many

    def __call__(self, mask):
        if not self.delayed:
            return int(mask.sum())
        self.n_call += 1

        # wait for the count of the call before
        if self.n_call % self.every == 0:
            count, event = self.started
            if event:
                event.synchronize()
            self.known = int(count)

        # start a count for the next call, if that one waits
        if (self.n_call + 1) % self.every == 0:
            count = mask.sum()
            event = torch.cuda.Event() if count.is_cuda else None
            self.started = count.to("cpu", non_blocking=True), event
            if event:
                event.record()
        return self.known


class ReplayedStep:
    """A function of tensors that becomes a CUDA graph: the first call runs it, the second records
    it, and from the second call on the result is a replay's, which the next call overwrites.
    """

    def __init__(self, place=loops):
        """place: where it is recorded; by default, where all loops are."""
        self.place = place
        self.inputs = None  # the graph's own copies
        self.graph = None

    def __call__(self, work, *inputs):
        """work(*inputs). Every call passes the same `work`, and inputs of the same shapes."""
        # the first call runs outside a graph, so that no recording compiles a kernel or allocates
        # what outlives it
        if self.inputs is None:
            self.inputs = [x.clone() for x in inputs]
            return work(*self.inputs)

        # a graph reads its inputs where they lay when it was recorded
        torch._foreach_copy_(self.inputs, inputs)

        # recording runs nothing, so the call that records is a replay, too
        if self.graph is None:
            self.graph, self.result = record(lambda: work(*self.inputs), self.place)
        self.graph.replay()
        return self.result
