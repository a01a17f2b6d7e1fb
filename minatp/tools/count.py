"""What a computation costs, counted and not timed: counts do not vary with the load of a machine.

    count             operations, bytes, floating-point operations, and waits of the host
    pass_bytes        the least that one position of a rollout has to read: the floor of a GPU
    kept_bytes        memory that a forward pass keeps for its backward pass
    training_memory   memory of a training step of any size, computed without running it

Used by the benchmark and by `train.py --dry-run`.
"""

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
# Operations that allocate and do no work
FREE = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.lift_fresh,
}
# The host has to wait for the GPU's result of these …
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select}
# … and of these if the index is a mask of booleans
INDEXED = {aten.index, aten.index_put, aten.index_put_}


# ---- operations ----------------------------------------------------------------------------------


@dataclass
class Counts:
    ops: int = 0  # calls that do work: neither views nor bare allocations
    # that they read and write: of every tensor that goes in or comes out of a call. One that is
    # changed in place counts as read and as written; one that goes in twice, as read twice
    bytes: int = 0
    flops: int = 0  # of matrix products, two for a multiply and add
    waits: int = 0  # of the host for values on the GPU


class Counter(TorchDispatchMode):
    """Counts the operations that run inside, but for `flops`."""

    def __init__(self):
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func.overloadpacket

        # Of what does work, count the bytes of every tensor that goes in or comes out
        if not is_view(func) and operation not in FREE:
            leaves = tree_leaves((args, kwargs, out))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            self.counts.ops += 1
            self.counts.bytes += sum(stored(t) for t in tensors)

            # Indexing by a mask first has to find its True entries, and the host waits for how many
            by_mask = operation in INDEXED and any(is_mask(index) for index in args[1])
            self.counts.waits += by_mask or operation in WAITS
        return out


def is_view(func):
    """Whether an operator returns views of its arguments, which it does not write."""
    # In a schema Tensor(a) is an alias of an argument, and Tensor(a!) one that is written
    returns = func._schema.returns
    aliases = [r.alias_info for r in returns]
    return bool(returns) and all(a is not None and not a.is_write for a in aliases)


def is_mask(index):
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def stored(t):
    """Bytes of a tensor's elements; an expanded dimension counts once."""
    # An expanded dimension has stride 0
    n = t.element_size()
    for size, stride in zip(t.shape, t.stride()):
        n *= size if stride or size == 0 else 1
    return n


def count(work):
    """The Counts of work(), which is called once."""
    counter = Counter()
    tolist = torch.Tensor.tolist

    def counted_tolist(tensor):  # on a CPU it runs no operation that Counter could see
        counter.counts.waits += 1
        return tolist(tensor)

    # FlopCounterMode knows the matrix products, Counter every operation, the patch tolist()
    patched = patch.object(torch.Tensor, "tolist", counted_tolist)
    with FlopCounterMode(display=False) as flops, counter, patched:
        work()
    counter.counts.flops = flops.get_total_flops()
    return counter.counts


# ---- the floor of a GPU --------------------------------------------------------------------------


@dataclass
class Machine:
    bandwidth: float  # bytes per second, read and written, of a large copy
    flops: float  # per second, of a large bf16 product


def pass_bytes(cfg, rows, T, logits):
    """Bytes in bf16 that one position of `rows` sequences of length T has to read.

    They are the layers' weights, the keys and values, and, if `logits`, the output matrix.
    """
    # Weights of a layer: the matrices of q and o, of k and v, and the three of the MLP
    attention = 2 * cfg.n_embd * cfg.head_dim * (cfg.n_head + cfg.n_kv_head)
    layer = attention + 3 * cfg.n_embd * cfg.n_inner

    # The cache of all rows; and the output matrix, which is read only to choose a word
    cached = 2 * cfg.n_layer * cfg.n_kv_head * cfg.head_dim * rows * T
    output = cfg.vocab_size * cfg.n_embd if logits else 0

    # In bf16 a number takes two bytes
    return 2 * (cfg.n_layer * layer + cached + output)


# ---- memory --------------------------------------------------------------------------------------


def kept_bytes(module, work):
    """Bytes that work() keeps for its backward pass, besides the module's parameters.

    A storage that is saved twice counts once.
    """
    # By storage and not by tensor: views of one storage share its memory
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    total = 0
    alive = []  # keeps the storages, so that no address is used again

    # Autograd calls pack on every tensor that it saves, and keeps what pack returns
    def pack(t):
        nonlocal total
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(storage)
            total += storage.nbytes()
        return t

    def unpack(t):
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = work()
    del result
    return total


def training_memory(cfg, K, c, batch_size, row, recompute=False, scale=8, distills=False):
    """Bytes of an SFT step of the last stage, with AdamW on one GPU, by use.

    Returns {"weights", "gradients", "moments", "bf16 weights", "activations", "logits"}. row: the
    data.Encoded that stands for every problem of the batch. scale: see `activations_per_row`.
    distills: whether the batch is also read in words, as with --distill.
    """
    # The whole model, which takes no memory. The chain has its own copy of its weights in bf16
    # (kernels/linear.py)
    with torch.device("meta"):
        model = ATP(cfg, c=c, K=K)
    n = n_elements(model)
    n_chain = n_elements(model.policy.model.layers, model.latent_head)

    # The logits of a labelled position: in bf16 and float32, their log-softmax, and the gradient in
    # both
    n_labelled = batch_size * (len(row.answer) + sum(map(len, row.step_texts)))
    if distills:
        n_labelled += batch_size * (len(row.answer) + sum(map(len, row.lines)))
    bytes_per_logit = 2 + 4 + 4 + 4 + 2
    per_row = activations_per_row(model, row, recompute, scale, distills)
    return {
        # float32; the moments are the two of AdamW
        "weights": 4 * n,
        "gradients": 4 * n,
        "moments": 8 * n,
        "bf16 weights": 2 * (n + n_chain),
        "activations": batch_size * per_row,
        "logits": n_labelled * cfg.vocab_size * bytes_per_logit,
    }


def activations_per_row(model, row, recompute, scale, distills):
    """Bytes of activations that autograd keeps for one problem like `row`, under bf16 autocast.

    Counted on a model of the same proportions, `scale` times narrower, with one layer and with two:
    activations grow with the width, with the tokens and, but for those outside the layers, with the
    number of layers.
    """
    cfg, narrow_row = model.policy.cfg, with_few_ids(row)

    # Count one problem and two of them, with one layer and with two
    by_layers = []
    for n_layer in (1, 2):
        small = narrow_model(model, n_layer, scale).set_recompute(recompute)
        one = kept_by_last_stage(small, [narrow_row], distills)
        two = kept_by_last_stage(small, [narrow_row] * 2, distills)
        by_layers.append(scale * (two - one))  # without what does not grow with the batch

    # The second layer's bytes are those of each further one
    layer = by_layers[1] - by_layers[0]
    return by_layers[0] + (cfg.n_layer - 1) * layer


def narrow_model(model, n_layer, scale):
    """An ATP of the same proportions, `scale` times narrower."""
    cfg = model.policy.cfg

    # Fewer heads of the same size. A small vocabulary, as logits are counted by themselves
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
    narrow = ATP(small, c=model.c, K=model.K)

    # Any id will do, here and in with_few_ids: what is kept depends on lengths alone
    narrow.end = 3
    return narrow


def with_few_ids(row):
    """A problem of the same lengths, for a vocabulary of few ids."""

    def like(ids):
        return [4] * len(ids)

    return replace(
        row,
        prompt=like(row.prompt),
        lines=[like(ids) for ids in row.lines],
        step_texts=[like(ids) for ids in row.step_texts],
        rest_text=like(row.rest_text),
        answer=like(row.answer),
    )


def kept_by_last_stage(model, rows, distills):
    """Bytes that the loss of the last stage keeps for its backward pass."""

    def loss():
        batch = collate(rows, model.K + 1, model, distills)
        eps = torch.zeros(len(rows), batch.thinking.n_candidate, model.policy.cfg.n_embd)

        # The kernels' references, which run anywhere, in the precision of a run on a GPU
        with patch.dict(os.environ, MINATP_KERNELS="torch"):
            with torch.autocast("cpu", torch.bfloat16):
                return total_loss(sft_losses(model, batch, eps), batch.counts, weights={})

    return kept_bytes(model, loss)


def n_elements(*modules):
    """How many parameters modules have."""
    return sum(p.numel() for module in modules for p in module.parameters())
