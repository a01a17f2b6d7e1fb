"""LLaMA, from scratch: GQA, RoPE with the llama3 scaling, RMSNorm, SwiGLU, and a KV cache.

The model works on embeddings, not on token ids, because half of what it reads here are thoughts and not words.
Parameter names are Hugging Face's, so a state_dict is a published file. Nothing here knows of latents or text.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import ops
from kernels.attention import masked_sdpa


@dataclass
class LlamaConfig:
    vocab_size: int = 128256
    n_layer: int = 16
    n_head: int = 32
    n_kv_head: int = 8
    n_embd: int = 2048
    n_inner: int = 8192
    head_dim: int = 64
    block_size: int = 131072         # longest context, in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = field(default_factory=lambda: dict(LLAMA3_ROPE))  # None: plain RoPE
    tied: bool = True                # the output matrix is the embedding
    bos: int = 128000
    eos: tuple = (128001,)           # the first is written, any of them ends an answer


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}


def rope_frequencies(cfg):
    """Angular frequency of each pair of dimensions, (head_dim/2,) float32, radians per position.

    The llama3 scaling leaves short wavelengths alone, divides long ones by `factor` and blends in between.
    """
    freq = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim)
    if not cfg.rope_scaling:
        return freq
    s = cfg.rope_scaling
    wavelength = 2 * math.pi / freq
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    smooth = ((s["original_max_position_embeddings"] / wavelength - low) / (high - low)).clamp(0, 1)
    return freq * (smooth + (1 - smooth) / s["factor"])


class KVCache:
    """Keys and values of every layer, the columns being shared by the rows, and which columns are real for each row.

    Without autograd the columns are written into memory allocated once for `T` columns. Under autograd a saved tensor must
    not be written again, so columns are joined instead, and the gradient of later columns flows back into earlier ones.
    """
    replays = False  # whether `step` is a CUDA graph (kernels/cache.py)

    def __init__(self, cfg, B, T, device):
        self.length = 0
        self.valid = torch.zeros(B, T, dtype=torch.bool, device=device)  # (B, T)
        self.count = torch.zeros(B, 1, dtype=torch.long, device=device)  # real positions so far, by row
        self.shape = B, cfg.n_kv_head, T, cfg.head_dim
        self.kv = [None] * cfg.n_layer

    def open(self, valid):
        """Make room for T_new columns, real where valid (B, T_new); returns their position ids (B, T_new)."""
        pos = self.count + valid.long().cumsum(1) - 1
        end = self.length + valid.shape[1]
        self.valid[:, self.length:end] = valid
        self.count = self.count + valid.sum(1, keepdim=True)
        self.length = end
        return pos.clamp(min=0)

    def mask(self, T_new):
        """What each new column may see, (B, 1, T_new, length): real columns up to itself; itself always, so no row is empty."""
        seen = torch.arange(self.length, device=self.valid.device)
        me = seen[-T_new:, None]
        return ((self.valid[:, None, : self.length] & (seen <= me)) | (seen == me))[:, None]

    def append(self, i, k, v):
        """Add k, v (B, h, T_new, hd) to layer i; returns all columns of it, (B, h, length, hd)."""
        if torch.is_grad_enabled():
            if self.kv[i] is not None:
                k, v = torch.cat((self.kv[i][0], k), 2), torch.cat((self.kv[i][1], v), 2)
            self.kv[i] = k, v
            return k, v
        if self.kv[i] is None:
            self.kv[i] = tuple(torch.empty(self.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        start = self.length - k.shape[2]
        for buffer, new in zip(self.kv[i], (k, v)):
            buffer[:, :, start:self.length] = new
        return tuple(buffer[:, :, : self.length] for buffer in self.kv[i])

    def attend(self, i, q, k, v, rope, mask):
        """Append k, v (B, h_kv, T_new, hd) to layer i and attend to it: q (B, h, n, hd), of the last n of them -> (B, h, n, hd)."""
        k, v = self.append(i, ops.rotate(k, *rope), v)
        n = q.shape[2]
        return attend(ops.rotate(q, *(x[:, :, -n:] for x in rope)), k, v, mask[:, :, -n:])

    def step(self, work, *inputs):
        """work(*inputs), which reads one column, and is the same every time."""
        return work(*inputs)

    def keep(self, rows, group=None):
        """Drop every row but `rows` (a LongTensor, repeats allowed): what is finished costs nothing more. group: how often each comes."""
        self.valid, self.count = self.valid[rows], self.count[rows]
        self.shape = (len(rows), *self.shape[1:])
        self.kv = [tuple(buffer[rows] for buffer in kv) for kv in self.kv]


def last(x, n):
    """The last n columns of x (B, T, D); all of them are x itself, which costs the backward pass nothing."""
    return x if n == x.shape[1] else x[:, -n:]


class RMSNorm(nn.Module):
    def __init__(self, D, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

    def forward(self, x, a=None):
        """The residual stream x with a branch's output a added, and its norm."""
        return ops.add_rms_norm(x, a, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.h, self.h_kv, self.hd = cfg.n_head, cfg.n_kv_head, cfg.head_dim
        self.q_proj = nn.Linear(cfg.n_embd, self.h * self.hd, bias=False)
        self.k_proj = nn.Linear(cfg.n_embd, self.h_kv * self.hd, bias=False)
        self.v_proj = nn.Linear(cfg.n_embd, self.h_kv * self.hd, bias=False)
        self.o_proj = nn.Linear(self.h * self.hd, cfg.n_embd, bias=False)

    def forward(self, x, n, rope, cache, i, mask):
        """Keys and values of all T columns of x (B, T, D), queries of the last n -> (B, n, D)."""
        B, T, _ = x.shape
        q = self.q_proj(last(x, n)).view(B, n, self.h, self.hd).transpose(1, 2)  # (B, h, n, hd)
        k = self.k_proj(x).view(B, T, self.h_kv, self.hd).transpose(1, 2)       # (B, h_kv, T, hd)
        v = self.v_proj(x).view(B, T, self.h_kv, self.hd).transpose(1, 2)
        return self.o_proj(cache.attend(i, q, k, v, rope, mask).transpose(1, 2).reshape(B, n, -1))


def attend(q, k, v, mask):
    """softmax(q kᵀ/√hd) v with grouped heads. q (B, h, T, hd), k and v (B, h_kv, S, hd), mask (B, 1, T, S) -> (B, h, T, hd)."""
    B, h, T, hd = q.shape
    if T > 1 or q.is_cuda:
        return masked_sdpa(q, k.to(q.dtype), v.to(q.dtype), mask)
    # one new position: the heads of a group are the rows of one product, and no key is copied
    q = q.reshape(B, k.shape[1], -1, hd)
    score = (q @ k.transpose(2, 3)) * hd**-0.5
    return (score.masked_fill(~mask, -torch.inf).softmax(-1) @ v).view(B, h, T, hd)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.n_embd, cfg.n_inner, bias=False)
        self.up_proj = nn.Linear(cfg.n_embd, cfg.n_inner, bias=False)
        self.down_proj = nn.Linear(cfg.n_inner, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.mlp = MLP(cfg)
        self.recompute = False  # of the MLP in the backward pass: most of the activations for a fifth more work

    def forward(self, x, a, n, rope, cache, i, mask):
        """The residual stream x and what the last branch adds to it, likewise after this block, of the last n columns: each norm does
        the addition before it."""
        x, y = self.input_layernorm(x, a)
        x, y = self.post_attention_layernorm(last(x, n), self.self_attn(y, n, rope, cache, i, mask))
        if self.recompute and torch.is_grad_enabled() and y.shape[1] > 1:  # a step of the chain keeps its inputs for dW
            return x, checkpoint(self.mlp, y, use_reentrant=False)
        return x, self.mlp(y)


class Llama(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(cfg.vocab_size, cfg.n_embd),
            "layers": nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer)),
            "norm": RMSNorm(cfg.n_embd, cfg.norm_eps),
        })
        if not cfg.tied:
            self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.register_buffer("freq", rope_frequencies(cfg), persistent=False)

    def init_weights(self, generator=None):
        """Normal of variance 1/D, the published 0.02 at D = 2048; √(2·n_layer) less for what joins the residual stream. Returns self."""
        std = self.cfg.n_embd ** -0.5
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, 0.0, std / math.sqrt(2 * self.cfg.n_layer) if residual else std, generator=generator)
        return self

    def start_from(self, other):
        """Take the weights of another of the same width, of its lower layers where it has more."""
        self.load_state_dict({k: v for k, v in other.state_dict().items() if k in self.state_dict()})

    def cache(self, B, T):
        """An empty cache for B rows and at most T columns."""
        return ops.cache(KVCache, self.cfg, B, T, self.model.embed_tokens.weight)

    def embed(self, ids):
        """ids (...) -> input embeddings (..., D)."""
        return self.model.embed_tokens(ids)

    def forward(self, x, valid, cache, n=None):
        """Read T new columns x (B, T, D), real where valid (B, T) bool, after those in the cache.

        Returns the hidden states after the final norm, (B, T, D), or of the last n columns alone: of the others the top layer then
        makes keys and values and nothing else. Positions count the real columns only.
        """
        angle = cache.open(valid)[:, None, :, None] * self.freq  # (B, 1, T, hd/2)
        rope, mask = (angle.cos().to(x.dtype), angle.sin().to(x.dtype)), cache.mask(x.shape[1])
        a = None
        for i, block in enumerate(self.model.layers):
            top = i == len(self.model.layers) - 1
            x, a = block(x, a, n if n and top else x.shape[1], rope, cache, i, mask)
        return self.model.norm(x, a)[1]

    def step(self, x, real, cache):
        """Read one column more, x (B, D), of the rows where real (B,) -> hidden states (B, D)."""
        return self(x[:, None], real[:, None], cache)[:, 0]

    def logits(self, h):
        """h (..., D) -> (..., vocab_size)."""
        return F.linear(h, self.head)

    @property
    def head(self):
        """The output matrix (vocab_size, D)."""
        return self.model.embed_tokens.weight if self.cfg.tied else self.lm_head.weight

    def nll(self, h, target, temperature=1.0):
        """-log p of each target (...), 0 where it is IGNORE; the logits of h (..., D) need not ever be in memory."""
        return ops.linear_nll(h, self.head, target, temperature)

    def add_rows(self, ids, source):
        """Rows `ids` of the embedding (and of the output matrix), which grows where it lacks them, become the mean of the rows `source`."""
        for table in [self.model.embed_tokens] + ([] if self.cfg.tied else [self.lm_head]):
            W = table.weight.data
            new = W[source].mean(0, keepdim=True)
            W = torch.cat((W, new.expand(max(0, max(ids) + 1 - len(W)), -1)))
            W[ids] = new
            table.weight = nn.Parameter(W)
        self.cfg.vocab_size = len(self.model.embed_tokens.weight)
