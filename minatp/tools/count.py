"""What a computation costs, counted and not timed: operations, bytes, floating-point operations, waits of the host, memory kept
for the backward pass. Counts do not swing with the load of a machine."""

import os
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..data import collate
from ..latent import ATP
from ..llama import LlamaConfig
from ..sft import sft_losses, total_loss

aten = torch.ops.aten
FREE = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.lift_fresh,
}
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
}  # a GPU's host has to wait for these …
INDEXED = {
    aten.index,
    aten.index_put,
    aten.index_put_,
}  # … and for these, where a mask of booleans is the index


@dataclass
class Counts:
    ops: int = 0  # calls that do work: no views, no bare allocations
    bytes: int = 0  # read and written by them, each tensor once a call
    flops: int = 0  # of products, two for a multiply and add
    waits: int = 0  # for values that the host asks a GPU for


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns, packet = func._schema.returns, func.overloadpacket
        is_view = bool(returns) and all(
            r.alias_info is not None and not r.alias_info.is_write for r in returns
        )
        if not is_view and packet not in FREE:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.counts.ops += 1
            self.counts.bytes += sum(map(stored, tensors))
            masked = packet in INDEXED and any(
                isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
            )
            self.counts.waits += masked or packet in WAITS
        return out


def stored(t):
    """Bytes of a tensor's elements, those of an expanded dimension once."""
    n = t.element_size()
    for size, stride in zip(t.shape, t.stride()):
        n *= size if stride or size == 0 else 1
    return n


def count(work):
    """Counts of work(), which is called once."""

    def tolist(
        tensor, real=torch.Tensor.tolist
    ):  # no operation of a CPU's, and so unseen by Counter
        counter.counts.waits += 1
        return real(tensor)

    with (
        FlopCounterMode(display=False) as flops,
        Counter() as counter,
        patch.object(torch.Tensor, "tolist", tolist),
    ):
        work()
    counter.counts.flops = flops.get_total_flops()
    return counter.counts


# ---- the floor of a GPU -------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    bandwidth: float  # bytes a second, read and written, of a large copy
    flops: float  # a second, of a large bf16 product


def pass_bytes(cfg, rows, T, logits):
    """Bytes that one position of `rows` sequences of length T has to read in bf16: the layers, the keys and values, the output matrix."""
    layer = (
        2 * cfg.n_embd * cfg.head_dim * (cfg.n_head + cfg.n_kv_head) + 3 * cfg.n_embd * cfg.n_inner
    )
    cached = 2 * cfg.n_layer * cfg.n_kv_head * cfg.head_dim * rows * T
    return 2 * (cfg.n_layer * layer + cached + (cfg.vocab_size * cfg.n_embd if logits else 0))


# ---- memory -------------------------------------------------------------------------------------------------------------


def kept_bytes(module, work):
    """Bytes that work() keeps for its backward pass, beside the module's parameters; a storage that is saved twice counts once."""
    known, total = {p.untyped_storage().data_ptr() for p in module.parameters()}, 0
    alive = []  # so that no address is used again

    def pack(t):
        nonlocal total
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(storage)
            total += storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = work()
    del result
    return total


def training_memory(cfg, K, c, batch_size, row, recompute=False, scale=8):
    """Bytes for an SFT step of the last stage with AdamW on one GPU: {"weights", "gradients", "moments", "bf16 weights",
    "activations", "logits"}, computed. row: the data.Encoded that every problem of the batch is taken to be.

    Activations are what autograd keeps, counted on a model of cfg's proportions, `scale` times narrower, under bf16 autocast: all
    of them grow with the width, with a problem's tokens and (beside what no layer holds) with the layers.
    """
    by_layers = []
    for n_layer in (1, 2):
        small = LlamaConfig(
            vocab_size=64,
            n_layer=n_layer,
            n_head=cfg.n_head // scale,
            n_kv_head=cfg.n_kv_head // scale,
            n_embd=cfg.n_embd // scale,
            n_inner=cfg.n_inner // scale,
            head_dim=cfg.head_dim,
            bos=0,
            eos=(1,),
        )
        model = ATP(small, c=c, K=K).set_recompute(recompute)
        model.end = 3
        one, two = (
            kept_bytes(model, lambda: last_stage_loss(model, [narrow(row)] * n)) for n in (1, 2)
        )
        by_layers.append(
            scale * (two - one)
        )  # the difference leaves out what does not grow with the batch: copies of weights
    per_row = by_layers[0] + (cfg.n_layer - 1) * (by_layers[1] - by_layers[0])
    with torch.device("meta"):
        model = ATP(cfg, c=c, K=K)
    size = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())
    n, chain = (
        size(model),
        size(model.policy.model.layers, model.latent_head),
    )  # the chain has its own copy (kernels/linear.py)
    labelled = batch_size * (len(row.answer) + sum(map(len, row.texts)))
    # a labelled position's logits: bf16, float32, their log-softmax, and its gradient in both
    return {
        "weights": 4 * n,
        "gradients": 4 * n,
        "moments": 8 * n,
        "bf16 weights": 2 * (n + chain),
        "activations": batch_size * per_row,
        "logits": labelled * cfg.vocab_size * (2 + 4 + 4 + 4 + 2),
    }


def narrow(row):
    """A problem of the same lengths, for a vocabulary of few ids."""
    like = lambda ids: [4] * len(ids)
    return replace(
        row,
        prompt=like(row.prompt),
        lines=list(map(like, row.lines)),
        texts=list(map(like, row.texts)),
        rest=like(row.rest),
        answer=like(row.answer),
    )


def last_stage_loss(model, rows):
    batch = collate(rows, model.K + 1, model)
    eps = torch.zeros(len(rows), batch.n_candidate, model.policy.cfg.n_embd)
    with patch.dict(os.environ, MINATP_KERNELS="torch"), torch.autocast("cpu", torch.bfloat16):
        return total_loss(sft_losses(model, batch, eps), batch.counts, 1e-3)
