"""The cache that the attention kernels read and write, with autograd through it.

It has the interface of minatp's KVCache (open, attend, repeat, fork, keep; it ignores `rows`, since
every call is of all rows), and what the replayed chain needs besides: after_prefix, append_own. The
first call's columns, left-padded, are the prefix: stored once, however many rows continue from it.
The columns of later calls are a row's own.

Both lie in memory that is written in place, which autograd cannot follow. So each operation on a
layer's columns is a node of its own:

    StoreColumns   store the first columns        backward: their keys and values receive what was
                                                  added to the gradient buffers
    AttendStep     kernels/attention.py           backward: adds to the buffers, and collects what
                                                  later steps added to its own columns
    LongPass       columns of a long pass         backward: adds the gradient of what was read.
                                                  (Under autograd it must be the last call)

Most of these nodes pass gradients through the buffers, where autograd does not see them. It must
still run them in exactly the reverse order: a step may collect its columns' gradients only after
every later step has added its share. An order token ensures that. It is a dummy scalar, one per
layer: each node takes the last node's scalar as an input and returns a new one, so autograd sees a
dependency between any two nodes of a layer. No number is ever read from it.

The rule relied on, here and in kernels/linear.py: autograd runs the backward of a node only after
that of every node that uses one of its outputs and leads to the loss.
"""

from copy import copy
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import attention, graph
from .attention import KV, Layout, StepInputs
from .common import ceil_div
from .rows import Rotate

MAX_STEP_COLUMNS = 8  # new positions that the step's kernel takes; SDPA serves a longer pass


class Columns:
    """Keys and values of some columns of one layer, and the float32 buffers of their gradients,
    which are allocated when they are first needed.
    """

    def __init__(self, k, v):
        self.kv = KV(k, v)
        self.grad = None

    def grad_buffers(self):
        """What has been added to the gradients so far, a KV of float32; zeros at first."""
        if self.grad is None:
            zeros = [torch.zeros_like(x, dtype=torch.float32) for x in self.kv]
            self.grad = KV(*zeros)
        return self.grad


# ---- operations on a layer's columns, as nodes of autograd ---------------------------------------
# Each forward but LongPass's returns a new order token, new_empty(()). (Under autograd LongPass is
# the last.) No backward reads the gradient of one, which may be None.


class StoreColumns(torch.autograd.Function):
    """(columns, order_token or None, k, v) -> order_token. The first ones of `columns` hold k and v
    (rows, h_kv, n, hd) already.
    """

    @staticmethod
    def forward(ctx, columns, order_token, k, v):
        ctx.columns = columns
        ctx.n = k.shape[2]
        ctx.set_materialize_grads(False)
        return k.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        # (autograd casts them to the dtype of k and v)
        grads = [grad[:, :, : ctx.n] for grad in ctx.columns.grad_buffers()]
        ctx.columns.grad = None  # passed on: a second backward pass starts from zeros
        return None, None, *grads


class AttendStep(torch.autograd.Function):
    """(prefix, own, layout, order_token, q, k, v, cos, sin) -> o (B, h, T, hd), order_token.
    Appends k and v to `own`.
    """

    @staticmethod
    def forward(ctx, prefix, own, layout, order_token, *inputs):
        inputs = StepInputs(*inputs)
        o, lse = attention.run_forward(inputs, prefix.kv, own.kv, layout)
        ctx.save_for_backward(*inputs, o, lse)

        # the caches are not saved tensors, because later calls write to them. What they write are
        # other columns: those that this step has read stay as they are
        ctx.caches = prefix, own
        ctx.layout = layout
        return o, o.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, do, order_token):
        *inputs, o, lse = ctx.saved_tensors
        if do.stride(3) != 1:  # the kernels take any strides but that of the last dimension
            do = do.contiguous()

        # dk and dv are those of the new positions, later steps' shares included. The gradients of
        # all columns read stay in the buffers, until the node that wrote the columns collects them
        caches = [columns.kv for columns in ctx.caches]
        grads = [columns.grad_buffers() for columns in ctx.caches]
        d_inputs = attention.run_backward(
            do, o, lse, StepInputs(*inputs), caches, grads, ctx.layout
        )
        return None, None, None, order_token, *d_inputs, None, None


class LongPass(torch.autograd.Function):
    """(prefix, own, order_token, k, v, owner, n_own) -> the keys and values of the prefix, of the
    first n_own own columns, and k and v (B, h_kv, T, hd) themselves, each
    (B, h_kv, P + n_own + T, hd).
    """

    @staticmethod
    def forward(ctx, prefix, own, order_token, k, v, owner, n_own):
        ctx.prefix = prefix
        ctx.own = own
        ctx.owner = owner
        ctx.sizes = prefix.kv.k.shape[2], n_own, k.shape[2]
        columns = zip(prefix.kv, own.kv, (k, v))
        return tuple(torch.cat((x[owner], y[:, :, :n_own], new), 2) for x, y, new in columns)

    @staticmethod
    @once_differentiable
    def backward(ctx, dk, dv):
        d_prefix, d_own, d_new = zip(*(grad.split(ctx.sizes, 2) for grad in (dk, dv)))

        # the rows that share a prefix add up in it; own columns belong to one row
        for buffer, d in zip(ctx.prefix.grad_buffers(), d_prefix):
            buffer.index_add_(0, ctx.owner, d.float())
        n_own = ctx.sizes[1]
        if n_own:
            for buffer, d in zip(ctx.own.grad_buffers(), d_own):
                buffer[:, :, :n_own] += d
        return None, None, None, *d_new, None, None


# ---- the cache -----------------------------------------------------------------------------------


class StepCache:
    """Keys and values of every layer, for B rows and at most `capacity` columns.

    The columns of the first call are left-padded (or, if nothing is read after them, padded
    anywhere). Each column of a later call may be real or not.

    Whoever makes the cache guarantees that its capacity is enough: all calls together open at most
    so many columns, real or not. So every slot is below C = capacity − P, and no kernel checks it.
    """

    # every call is of all rows: on a GPU a step costs the same for any number of them
    fixed_shape = True

    def __init__(self, B, capacity, device):
        # of each layer that has read something: its Columns, and its order token
        self.prefix, self.own, self.order_tokens = {}, {}, {}
        self.room = capacity  # for own columns, once there is a prefix

        # where a row's columns lie
        self.owner = torch.arange(B, device=device)  # (B,) prefix of each row
        self.n_own = torch.zeros(B, dtype=torch.long, device=device)  # (B,) own columns
        self.n_opened = 0  # columns opened after the prefix, at most: no row has more of its own
        self.is_closed = False  # whether a long pass under autograd, which is the last, has come

        # steps as CUDA graphs
        self.replays_steps = graph.use_graphs(device)
        self.steps = WeakKeyDictionary()  # what is replayed -> its ReplayedStep

    def open(self, valid):
        """Make room for new columns, real where valid (B, T); returns their position ids (B, T).

        Raises RuntimeError after a long pass under autograd: no gradient leads back to its columns.
        """
        T = valid.shape[1]
        if self.is_closed:
            raise RuntimeError("under autograd a long pass must be the last")

        # the first call is the prefix
        if not self.prefix:
            self.start = T - valid.sum(1)  # (N,) first real column of each prefix
            self.P = T  # columns of the prefix
            self.room -= T
            self.group_rows()

            # its columns are all new to themselves
            layout = self.layout_of(self.n_own, valid.int() - 1)
            self.mask = attention.visible_mask(layout, 0, 0)[:, None]  # (B, 1, T, T)
            return (valid.long().cumsum(1) - 1).clamp(min=0)

        # later calls: a real column goes behind the row's own ones. (n_own is written in place: a
        # replayed step finds it at this address)
        n_before, slot, position = attention.open_columns(valid, self.n_own, self.n_prefix_real)
        self.layout = self.layout_of(n_before, slot)
        self.n_earlier = self.n_opened
        self.n_opened = min(self.n_opened + T, self.room)

        # a step's kernel needs no mask; a long pass does
        self.mask = None
        if T > MAX_STEP_COLUMNS:
            # (B, 1, T, columns)
            self.mask = attention.visible_mask(self.layout, self.P, self.n_earlier)[:, None]
            self.is_closed = torch.is_grad_enabled()
            # the indices of its real columns: here the host waits, once and not in every layer
            self.real = None if self.is_closed else valid.nonzero(as_tuple=True)
        return position

    def group_rows(self):
        """Sort the rows by their prefix: the parts of a Layout that change only here."""
        # members[member_offsets[n] : member_offsets[n + 1]] are the rows of prefix n
        # (a recorded chain does this, too: nothing here makes the host wait)
        owners, members = self.owner.sort(stable=True)
        prefix = torch.arange(len(self.start) + 1, device=members.device)
        member_offsets = torch.searchsorted(owners, prefix)

        # rows per prefix, a mean (the host would have to wait for the largest); only a hint
        mean_group = ceil_div(len(self.owner), len(self.start))
        tensors = [x.int() for x in (self.start, self.owner, members, member_offsets)]
        self.layout_of = partial(Layout, *tensors, mean_group)
        self.n_prefix_real = self.P - self.start[self.owner]  # (B,) real columns of its prefix

    def attend(self, i, q, k, v, rope):
        """Append k, v (B, h_kv, T, hd) to layer i and attend to it: q (B, h, n, hd), the queries of
        the last n of them -> (B, h, n, hd). rope: (cos, sin), each (B, 1, T, hd/2).

        k and v have one dtype.
        """
        cos, sin = (x.float().contiguous() for x in rope)
        assert k.dtype == v.dtype

        # a step: the kernel rotates, appends and attends
        n, T = q.shape[2], k.shape[2]
        if self.mask is None:
            if n < T:  # it takes a query of each column
                q = F.pad(q, (0, 0, T - n, 0))
            columns = self.prefix[i], self.own_columns(i, k)
            o, self.order_tokens[i] = AttendStep.apply(
                *columns, self.layout, self.order_tokens[i], q, k, v, cos, sin
            )
            return o[:, :, T - n :]

        # a long pass: rotate, join all columns, SDPA
        q = Rotate.apply(q, cos[:, :, T - n :].contiguous(), sin[:, :, T - n :].contiguous())
        k = Rotate.apply(k, cos, sin)
        if i not in self.prefix:
            self.store_prefix(i, k, v)
        else:
            k, v = self.append_long(i, k, v)
        return attention.masked_sdpa(q, k, v, self.mask[:, :, T - n :])

    def store_prefix(self, i, k, v):
        """The first call's keys and values become layer i's prefix."""
        columns = self.prefix[i] = Columns(k.contiguous(), v.contiguous())
        self.order_tokens[i] = StoreColumns.apply(columns, None, *columns.kv)

    def append_long(self, i, k, v):
        """Append a long pass to layer i, unless it is the last; returns the keys and values of all
        columns, the prefix's, the own ones before this call, and k and v.
        """
        own = self.own_columns(i, k)
        if not self.is_closed:
            # only real positions: the others have no column
            b, t = self.real
            for buffer, new in zip(own.kv, (k, v)):
                buffer[b, :, self.layout.slot[b, t]] = new[b, :, t].to(buffer.dtype)

        # no row has more than n_earlier of the earlier ones; the mask hides those that it lacks
        return LongPass.apply(
            self.prefix[i], own, self.order_tokens[i], k, v, self.owner, self.n_earlier
        )

    def own_columns(self, i, k):
        """Layer i's own columns, allocated at the first call after the prefix."""
        if i not in self.own:
            # zeros: a long pass multiplies columns that a row has not filled by a weight of 0, and
            # 0·NaN is NaN
            B, h_kv, _, hd = k.shape
            shape = B, h_kv, self.room, hd
            self.own[i] = Columns(k.new_zeros(shape), k.new_zeros(shape))
        return self.own[i]

    def repeat(self, work, *inputs):
        """work(*inputs), which reads one column at every call. If steps are CUDA graphs, the second
        call with the same `work` is recorded, and from then on each is a replay. A `keep` begins
        anew.
        """
        if not self.replays_steps:
            return work(*inputs)
        step = self.steps.setdefault(work, graph.ReplayedStep())
        result = step(work, *inputs)

        # a replay runs no Python, so `open` has not counted its columns: any may be filled
        self.n_opened = self.room
        return result

    def fork(self):
        """A second cache that has read the same prefix. Neither has read anything after it yet."""
        cache = copy(self)
        cache.own, cache.order_tokens = {}, dict(self.order_tokens)
        cache.n_own = self.n_own.clone()
        return cache

    def keep(self, rows):
        """Continue with the rows `rows` (a LongTensor, repeats allowed) alone. The prefix stays
        where it is.
        """
        self.owner = self.owner[rows]
        self.n_own = self.n_own[rows]
        self.steps = WeakKeyDictionary()  # other shapes: record anew
        self.group_rows()
        for i, own in self.own.items():
            assert not torch.is_grad_enabled(), "no gradient leads back to the rows before"
            self.own[i] = Columns(*(x[rows] for x in own.kv))

    # ---- for the replayed chain ----

    @classmethod
    def after_prefix(cls, kv, start, owner, room):
        """A cache whose B rows have read a prefix and nothing else, with room for so many own
        columns. kv: keys and values (N, h_kv, P, hd) of each layer, in one list. start (N,): the
        first real column of each prefix. owner (B,): the prefix of each row.
        """
        cache = cls(len(owner), room, owner.device)
        cache.start = start
        cache.owner = owner
        cache.P = kv[0].shape[2]
        cache.group_rows()
        for i in range(len(kv) // 2):
            cache.store_prefix(i, *kv[2 * i : 2 * i + 2])
        return cache

    def append_own(self, kv, n_real):
        """Append columns that another cache has made: keys and values (B, h_kv, n, hd) of each
        layer, in one list. n_real (B,): how many of a row's are real, the first ones.
        """
        memory = []
        for i, (k, v) in enumerate(zip(kv[::2], kv[1::2])):
            own = self.own_columns(i, k)
            memory += (x[:, :, : k.shape[2]] for x in own.kv)
            self.order_tokens[i] = StoreColumns.apply(own, self.order_tokens[i], k, v)
        with torch.no_grad():
            torch._foreach_copy_(memory, kv)

        self.n_own += n_real
        self.n_opened += kv[0].shape[2]
