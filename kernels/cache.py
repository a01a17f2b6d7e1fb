"""The cache that the attention kernels read and write, with autograd through it; its interface is minatp's KVCache, and what minatp/chain.py
needs: `fork`, `thread`, `n_own`.

The columns read first, left-padded, are the prefix: kept once, however many rows go on from it. What follows is a row's own. Both lie
in memory that is written in place, which autograd cannot follow, so each operation on a layer's columns is a node of its own:

    Begin   the prefix is stored       backward: its keys and values receive what was added to the prefix's buffers
    Step    kernels/attention.py       backward: adds to the buffers, and takes what later steps added to its own columns
    Read    columns for a long pass    backward: adds the gradient of what was read
    Append  columns of a long pass     backward: takes what was added to them
    Keep    other rows go on           backward: adds the new rows' buffers to the old rows'

The nodes of a layer are threaded on a scalar that holds nothing: each takes the last one's and gives its own, so that autograd runs
them in exactly the reverse order, whether or not a number flows from one to the next.
"""
from copy import copy

import torch
from torch.autograd.function import once_differentiable

from . import attention, graph
from .rows import Rotate

FEW = 8  # new positions that the step's kernel takes; a longer pass is SDPA's


class Columns:
    """Keys and values of some rows in one layer, and the float32 buffers of their gradients, made when first needed."""
    def __init__(self, k, v):
        self.kv, self.grad = (k, v), None

    def gradient(self):
        if self.grad is None:
            self.grad = tuple(torch.zeros_like(x, dtype=torch.float32) for x in self.kv)
        return self.grad

    def take(self, at):
        """What was added to columns `at` (B, T; −1: none), which is cleared."""
        index, real = at.clamp(min=0)[:, None, :, None].long(), (at >= 0)[:, None, :, None]
        taken = []
        for g in self.gradient():
            i = index.expand(-1, g.shape[1], -1, g.shape[3])
            taken.append(g.gather(2, i) * real)
            g.scatter_add_(2, i, -taken[-1])
        return taken


class Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, columns, k, v):
        ctx.columns = columns
        return k.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        gk, gv = (g.to(x.dtype) for g, x in zip(ctx.columns.gradient(), ctx.columns.kv))
        ctx.columns.grad = None
        return None, gk, gv


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prefix, own, thread, q, k, v, cos, sin, where):
        o, lse = attention.run_forward(q, k, v, cos, sin, prefix.kv, own.kv, where)
        ctx.save_for_backward(q, k, v, cos, sin, o, lse)
        ctx.columns = prefix, own, where
        return o, q.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, do, thread):
        (q, k, v, cos, sin, o, lse), (prefix, own, where) = ctx.saved_tensors, ctx.columns
        do = do if do.stride(3) == 1 else do.contiguous()
        dq, dk, dv = attention.run_backward(do, o, lse, q, k, v, cos, sin, prefix.kv, own.kv, prefix.gradient(), own.gradient(), where)
        return None, None, thread, dq, dk, dv, None, None, None


class Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prefix, own, thread, owner, n):
        ctx.columns, ctx.owner, ctx.n = (prefix, own), owner, n
        k, v = (torch.cat((p[owner], x[:, :, :n]), 2) for p, x in zip(prefix.kv, own.kv))
        return k, v, k.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, dk, dv, thread):
        prefix, own = ctx.columns
        P = prefix.kv[0].shape[2]
        for d, shared, mine in zip((dk.float(), dv.float()), prefix.gradient(), own.gradient()):
            shared.index_add_(0, ctx.owner, d[:, :, :P])
            mine[:, :, : ctx.n] += d[:, :, P:]
        return None, None, thread, None, None


class Append(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, thread, k, v, slot, real):
        ctx.own, ctx.slot, ctx.dtype = own, slot, k.dtype
        b, t = real
        for buffer, new in zip(own.kv, (k, v)):
            buffer[b, :, slot[b, t]] = new[b, :, t].to(buffer.dtype)
        return k.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, thread):
        dk, dv = ctx.own.take(ctx.slot)
        return None, thread, dk.to(ctx.dtype), dv.to(ctx.dtype), None, None


class Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, old, new, thread, rows):
        ctx.columns, ctx.rows = (old, new), rows
        return thread.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, thread):
        old, new = ctx.columns
        for g, d in zip(old.gradient(), new.gradient()):
            g.index_add_(0, ctx.rows, d)
        new.grad = None
        return None, None, thread, None


class StepCache:
    """Keys and values of every layer. The columns read first are left-padded (or, where nothing is read after them, padded
    anywhere); those of later calls may be real or not, as they like."""
    def __init__(self, cfg, B, T, device):
        self.T, self.shape, self.rep = T, (cfg.n_kv_head, cfg.head_dim), cfg.n_head // cfg.n_kv_head
        self.prefix, self.own, self.thread = ([None] * cfg.n_layer for _ in range(3))
        self.start = self.slot = None                                     # start (N,): of each prefix; None before the first call
        self.owner, self.group = torch.arange(B, device=device), 1        # prefix of each row; most rows of one
        self.n_own = torch.zeros(B, dtype=torch.long, device=device)      # own columns, by row
        self.P = self.used = 0                                            # columns of the prefix, and of the longest row of its own
        self.replays, self.replayed = graph.serves(device), graph.Replayed()

    def open(self, valid):
        """Make room for new columns, real where valid (B, T); returns their position ids (B, T)."""
        T, rank = valid.shape[1], valid.long().cumsum(1) - 1
        if self.start is None:
            self.start, self.P, self.valid = T - valid.sum(1), T, valid
            self.regroup()
            return rank.clamp(min=0)
        before = self.n_own.clone()
        self.slot = torch.where(valid, before[:, None] + rank, -1)
        self.n_own += valid.sum(1)  # in place, where a replayed step finds it
        self.used += T
        self.real = valid.nonzero(as_tuple=True) if T > FEW else None  # the host waits once, not in every layer
        self.where = attention.Where(*self.groups, self.group, before.int(), self.slot.int())
        return ((self.behind + before)[:, None] + rank).clamp(min=0)

    def regroup(self):
        """Who goes on from which prefix."""
        members = self.owner.argsort(stable=True)
        first = torch.searchsorted(self.owner[members], torch.arange(len(self.start) + 1, device=members.device))
        self.groups = [x.int() for x in (self.start, self.owner, members, first)]
        self.behind = self.P - self.start[self.owner]  # real columns of each row's prefix

    def mask(self, T):
        """What each of T new columns sees of all, (B, 1, T, columns), for a long pass; None for a step, whose kernel knows."""
        if self.slot is None:
            t = torch.arange(T, device=self.valid.device)
            return ((self.valid[:, None] & (t <= t[:, None])) | (t == t[:, None]))[:, None]
        return None if T <= FEW else attention.visible(self.where, self.P, self.used - T)[:, None]

    def attend(self, i, q, k, v, rope, mask):
        """Append k, v (B, h_kv, T, hd) to layer i and attend to it: q (B, h, n, hd), of the last n of them -> (B, h, n, hd)."""
        cos, sin = (x.float() for x in rope)
        if self.slot is not None and mask is None:
            o, self.thread[i] = Step.apply(self.prefix[i], self.room(i, k), self.thread[i], q, k, v, cos, sin, self.where)
            return o
        n = q.shape[2]
        q, k = Rotate.apply(q, *(x[:, :, -n:].contiguous() for x in (cos, sin))), Rotate.apply(k, cos, sin)
        if self.slot is None:
            self.prefix[i] = Columns(*(x.detach().contiguous() for x in (k, v)))
            self.thread[i] = Begin.apply(self.prefix[i], k, v)
        else:
            own = self.room(i, k)
            old_k, old_v, thread = Read.apply(self.prefix[i], own, self.thread[i], self.owner, self.used - k.shape[2])
            self.thread[i] = Append.apply(own, thread, k, v, self.slot, self.real)
            k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
        return attention.masked_sdpa(q, k, v, mask[:, :, -n:])

    def step(self, work, *inputs):
        """work(*inputs), which reads one column; where steps are graphs, a replay from the second step after a `keep` on."""
        if not self.replays:
            return work(*inputs)
        used = self.used + 1  # a replay runs no Python
        result = self.replayed(work, *inputs)
        self.used = used
        return result

    def fork(self):
        """A copy that later columns and `keep`s do not change, for the chain's backward pass; keys and values are shared."""
        same = copy(self)
        same.own, same.n_own, same.thread, same.replayed = list(self.own), self.n_own.clone(), [None] * len(self.own), None
        return same

    def room(self, i, k):
        """Layer i's own columns, made at the first of them."""
        if self.own[i] is None:
            shape = (len(self.owner), self.shape[0], self.T - self.P, self.shape[1])
            self.own[i] = Columns(*(k.new_zeros(shape) for _ in range(2)))
        return self.own[i]

    def keep(self, rows, group=None):
        """Go on with `rows` (a LongTensor) alone, `group` of each where they are repeated. The prefix stays where it is."""
        self.group = group or self.group
        self.owner, self.n_own, self.replayed = self.owner[rows], self.n_own[rows], graph.Replayed()
        self.regroup()
        for i, old in enumerate(self.own):
            if old is not None:
                self.own[i] = Columns(*(x[rows] for x in old.kv))
                self.thread[i] = Keep.apply(old, self.own[i], self.thread[i], rows)
