"""LLaMA from scratch: grouped-query attention, RoPE, RMSNorm, SwiGLU, and a KV cache.

The model works on embeddings, not on token ids, because a latent is an embedding that no id has.
Parameter names are Hugging Face's, so that a state_dict is a published file. Nothing in this file
asks where its inputs come from.
"""

import math
from copy import copy
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from kernels import ops
from kernels.attention import masked_sdpa
from kernels.cache import StepCache
from kernels.common import upcast
from kernels.linear import Linear, together

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass
class LlamaConfig:
    """The shape of a LLaMA; the defaults are Llama-3.2-1B's."""

    vocab_size: int = 128256
    n_layer: int = 16
    n_head: int = 32
    n_kv_head: int = 8
    n_embd: int = 2048
    n_inner: int = 8192
    head_dim: int = 64
    block_size: int = 131072  # longest context, in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = field(default_factory=lambda: dict(LLAMA3_ROPE))  # None: plain RoPE
    tied: bool = True  # the output matrix is the embedding
    bos: int = 128000
    eos: tuple = (128001,)  # the first is written, any of them ends an answer


def rope_frequencies(cfg):
    """The angular frequency of each pair of dimensions, (head_dim/2,), in radians per position.

    The llama3 scaling leaves short wavelengths alone, divides the frequency of long ones by
    `factor`, and blends in between.
    """
    exponent = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim
    freq = cfg.rope_theta**-exponent
    if not cfg.rope_scaling:
        return freq
    s = cfg.rope_scaling
    wavelength = 2 * math.pi / freq
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    turns = s["original_max_position_embeddings"] / wavelength  # within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return freq * (smooth + (1 - smooth) / s["factor"])


class KVCache:
    """Keys and values of every layer.

    All rows share the columns; a mask says which columns are real for each row.

    Without autograd, columns are written into memory allocated once for `T` of them. Under autograd
    a saved tensor must not be overwritten, so columns are concatenated instead, and the gradient of
    later columns flows back into earlier ones.
    """

    # True in the cache of kernels/cache.py: whether `step` is a CUDA graph, and whether a step must
    # compute all rows
    replays_steps = False
    fixed_shape = False

    def __init__(self, cfg, B, T, device):
        self.length = 0
        self.valid = torch.zeros(B, T, dtype=torch.bool, device=device)  # (B, T): real columns
        self.count = torch.zeros(B, 1, dtype=torch.long, device=device)  # (B, 1): how many so far
        # The rows that take part in the next calls: all, or a LongTensor without repeats. The
        # others wait, and cost nothing. Under autograd all have to take part
        self.rows = slice(None)
        self.shape = B, cfg.n_kv_head, T, cfg.head_dim
        self.kv = [None] * cfg.n_layer  # of each layer: (keys, values)

    def open(self, valid):
        """Make room for new columns, real where valid (B, T_new).

        Returns their position ids (B, T_new).
        """
        position = self.count[self.rows] + valid.long().cumsum(1) - 1
        start, end = self.length, self.length + valid.shape[1]
        self.valid[self.rows, start:end] = valid
        self.count[self.rows] += valid.sum(1, keepdim=True)
        self.length = end

        # Each new column sees the real columns up to itself; always itself, so that no row is empty
        column = torch.arange(end, device=valid.device)
        own = column[start:, None]
        visible = self.valid[self.rows, None, :end] & (column <= own)
        self.mask = (visible | (column == own))[:, None]  # (B, 1, T_new, length)
        return position.clamp(min=0)

    def append(self, i, k, v):
        """Add k, v (B, h_kv, T_new, hd) to layer i. Returns all of it, (B, h_kv, length, hd)."""
        if torch.is_grad_enabled():
            if self.kv[i] is not None:
                old_k, old_v = self.kv[i]
                k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
            self.kv[i] = k, v
            return k, v
        if self.kv[i] is None:
            self.kv[i] = k.new_zeros(self.shape), v.new_zeros(self.shape)
        start = self.length - k.shape[2]
        for buffer, new in zip(self.kv[i], (k, v)):
            buffer[self.rows, :, start : self.length] = new
        return tuple(buffer[self.rows, :, : self.length] for buffer in self.kv[i])

    def attend(self, i, q, k, v, rope):
        """Append k, v (B, h_kv, T_new, hd) to layer i and attend to it. Returns (B, h, n, hd).

        q (B, h, n, hd): of the last n of the new columns. rope: (cos, sin) of the new columns.
        The cache does this, and not Attention, because that of the GPU (kernels/cache.py) has
        kernels of its own for it.
        """
        n = q.shape[2]
        cos, sin = rope
        # RoPE: the halves x₁, x₂ of a head turn by the angle of its position:
        # (x₁·cos − x₂·sin, x₂·cos + x₁·sin). The cache keeps keys and values in one dtype
        k, v = self.append(i, ops.rotate(k, cos, sin).to(k.dtype), v)
        q = ops.rotate(q, cos[:, :, -n:], sin[:, :, -n:]).to(q.dtype)
        mask = self.mask[:, :, -n:]

        # softmax(q·kᵀ/√hd)·v
        if n > 1 or q.is_cuda:
            return masked_sdpa(q, k, v, mask)
        # One new position: the heads of a group are the rows of one product, and no key is copied
        B, h, _, hd = q.shape
        q = q.reshape(B, k.shape[1], -1, hd)  # (B, h_kv, h/h_kv, hd)
        scores = (q @ k.transpose(2, 3)) * hd**-0.5  # (B, h_kv, h/h_kv, length)
        y = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return y.view(B, h, n, hd)

    def repeat(self, work, *inputs):
        """Run one step of a loop, work(*inputs).

        The GPU's cache records the second call as a CUDA graph and replays it from then on, so
        every call must be given the same function.
        """
        return work(*inputs)

    def fork(self):
        """A second cache that has read the same. What either reads next, the other does not see."""
        other = copy(self)
        other.valid, other.count = self.valid.clone(), self.count.clone()
        other.kv = list(self.kv)
        if not torch.is_grad_enabled():
            other.kv = [(k.clone(), v.clone()) for k, v in self.kv]
        return other

    def keep(self, rows):
        """Keep only `rows` (a LongTensor, repeats allowed): the others cost nothing more."""
        self.valid, self.count = self.valid[rows], self.count[rows]
        self.shape = (len(rows), *self.shape[1:])
        self.kv = [(k[rows], v[rows]) for k, v in self.kv]


class RMSNorm(nn.Module):
    def __init__(self, D, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.eps = eps

    def forward(self, x, branch=None):
        """x (B, T, D), branch -> (x + branch, its norm). Block says why the addition is here."""
        # x ← x + branch;  y = weight · x / √(mean(x²) + eps)
        return ops.add_rms_norm(x, branch, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.h, self.h_kv, self.hd = cfg.n_head, cfg.n_kv_head, cfg.head_dim
        self.q_proj = Linear(cfg.n_embd, self.h * self.hd, bias=False)
        self.k_proj = Linear(cfg.n_embd, self.h_kv * self.hd, bias=False)
        self.v_proj = Linear(cfg.n_embd, self.h_kv * self.hd, bias=False)
        self.o_proj = Linear(self.h * self.hd, cfg.n_embd, bias=False)

    def forward(self, x, n, rope, cache, i):
        """Layer i: keys and values of all T columns of x (B, T, D), queries of the last n.

        Returns (B, n, D).
        """
        B, T, _ = x.shape
        if n == T:
            # = self.q_proj(x), self.k_proj(x), self.v_proj(x); on a GPU one product
            q, k, v = together(x, self.q_proj, self.k_proj, self.v_proj)
        else:
            q, k, v = self.q_proj(x[:, -n:]), self.k_proj(x), self.v_proj(x)
        q = q.view(B, n, self.h, self.hd).transpose(1, 2)  # (B, h, n, hd)
        k = k.view(B, T, self.h_kv, self.hd).transpose(1, 2)  # (B, h_kv, T, hd)
        v = v.view(B, T, self.h_kv, self.hd).transpose(1, 2)
        y = cache.attend(i, q, k, v, rope)  # (B, h, n, hd)
        return self.o_proj(y.transpose(1, 2).reshape(B, n, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = Linear(cfg.n_embd, cfg.n_inner, bias=False)
        self.up_proj = Linear(cfg.n_embd, cfg.n_inner, bias=False)
        self.down_proj = Linear(cfg.n_inner, cfg.n_embd, bias=False)

    def forward(self, x):
        gate, up = together(x, self.gate_proj, self.up_proj)
        return self.down_proj(ops.swiglu(gate, up))  # silu(gate)·up


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.mlp = MLP(cfg)
        # compute the MLP again in the backward pass: saves most activations for a fifth more work
        self.recompute = False

    def forward(self, x, branch, n, rope, cache, i):
        """x ← x + attention(norm(x)), then x ← x + mlp(norm(x)).

        Each addition is left to the norm that follows, so that one kernel can do both. So x
        (B, T, D) comes with a branch that is still to be added, and is returned with another, both
        of the last n columns.
        """
        x, y = self.input_layernorm(x, branch)
        y = self.self_attn(y, n, rope, cache, i)
        x, y = self.post_attention_layernorm(x if n == x.shape[1] else x[:, -n:], y)
        # Not for a single column, whose inputs are kept anyway, for the gradients of the weights
        # (deferred_weight_gradients in chain.walk)
        if self.recompute and torch.is_grad_enabled() and y.shape[1] > 1:
            return x, checkpoint(self.mlp, y, use_reentrant=False)
        return x, self.mlp(y)


class Llama(nn.Module):
    # whether it reads bos before embeddings that are not words (decoder.thought_embeddings)
    reads_bos = False

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(cfg.vocab_size, cfg.n_embd),
                "layers": nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer)),
                "norm": RMSNorm(cfg.n_embd, cfg.norm_eps),
            }
        )
        if not cfg.tied:
            self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.register_buffer("freq", rope_frequencies(cfg), persistent=False)

    # ---- weights ---------------------------------------------------------------------------------

    def init_weights(self, generator=None):
        """Normal with standard deviation 1/√D: 0.022 at D = 2048, near the published 0.02.

        o_proj and down_proj, whose outputs join the residual stream, start √(2·n_layer) times
        smaller. Returns self.
        """
        std = self.cfg.n_embd**-0.5
        for name, p in self.named_parameters():
            if p.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = std / math.sqrt(2 * self.cfg.n_layer) if is_residual else std
                nn.init.normal_(p, 0.0, scale, generator=generator)
        return self

    def start_from(self, other):
        """Copy weights of another Llama of the same width, of its lower layers if it has more.

        Raises ValueError if it has fewer.
        """
        n, n_other = self.cfg.n_layer, other.cfg.n_layer
        if n > n_other:
            raise ValueError(f"{n} layers cannot start from the weights of {n_other}")
        own = self.state_dict()
        self.load_state_dict({k: v for k, v in other.state_dict().items() if k in own})

    def add_rows(self, ids, source):
        """Set rows `ids` of the embedding, and of an untied output matrix, to the mean of the rows
        `source`. The matrices grow if they lack these rows.
        """
        tables = [self.model.embed_tokens] + ([] if self.cfg.tied else [self.lm_head])
        for table in tables:
            W = table.weight.data
            new = W[source].mean(0, keepdim=True)
            n_missing = max(0, max(ids) + 1 - len(W))
            W = torch.cat((W, new.expand(n_missing, -1)))
            W[ids] = new
            table.weight = nn.Parameter(W)
        self.cfg.vocab_size = len(self.model.embed_tokens.weight)

    # ---- reading ---------------------------------------------------------------------------------

    def cache(self, B, T):
        """An empty cache for B rows and at most T columns."""
        weight = self.model.embed_tokens.weight
        if ops.has_kernel(weight):
            return StepCache(B, T, weight.device)
        return KVCache(self.cfg, B, T, weight.device)

    def embed(self, ids):
        """ids (...) -> input embeddings (..., D)."""
        return self.model.embed_tokens(ids)

    def forward(self, x, valid, cache, last=None, states_at=None):
        """Read T new columns x (B, T, D), real where valid (B, T) bool, after those in the cache.

        Returns the hidden states after the final norm, (B, T, D), or those of the `last` columns
        alone: of the others the top layer then makes keys and values and nothing else.
        Positions count the real columns only.

        states_at: the indices (rows, columns) of N of these positions. Then it returns (hidden
        states, states (n_layer, N, D)): what each layer leaves there, the top one after the norm.
        """
        T = x.shape[1]

        # The angle of each position, for RoPE
        position = cache.open(valid)  # (B, T)
        angle = position[:, None, :, None] * self.freq  # (B, 1, T, hd/2)
        rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)

        # The layers; each leaves a branch to be added by the next norm
        branch = None
        states = []
        top = len(self.model.layers) - 1
        for i, block in enumerate(self.model.layers):
            n_out = last if last and i == top else T
            x, branch = block(x, branch, n_out, rope, cache, i)
            if states_at is not None and i < top:
                states.append(upcast(x[states_at]) + branch[states_at])
        _, h = self.model.norm(x, branch)
        if states_at is None:
            return h
        return h, torch.stack([*states, upcast(h[states_at])])

    def step(self, x, real, cache):
        """Read one more column, x (B, D), of the rows where real (B,) -> hidden states (B, D)."""
        return self(x[:, None], real[:, None], cache)[:, 0]

    # ---- writing ---------------------------------------------------------------------------------

    @property
    def head(self):
        """The output matrix (vocab_size, D)."""
        return self.model.embed_tokens.weight if self.cfg.tied else self.lm_head.weight

    def logits(self, h):
        """h (..., D) -> (..., vocab_size)."""
        return ops.logits(h, self.head)

    def nll(self, h, target, temperature=1.0):
        """−log p of each target (...), 0 where it is IGNORE.

        The logits of h (..., D) need never be in memory at once.
        """
        # −log softmax(h·headᵀ/temperature)[target]
        return ops.linear_nll(h, self.head, target, temperature)
