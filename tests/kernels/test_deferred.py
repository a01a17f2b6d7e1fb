"""Weight gradients of the chain of latents, computed once: equal to autograd's own, in one product for each weight."""
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear
from kernels.linear import Deferred, deferred
from minatp import chain, data, rollout
from minatp.latent import ATP
from minatp.llama import LlamaConfig
from minatp.loss import total_loss

CFG = LlamaConfig(vocab_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, n_inner=24, head_dim=4, bos=0, eos=(1,))
LINES = [[7, 8], [9], [10, 4]]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(linear, "LEAST", 0)
    torch.manual_seed(0)
    model = ATP(CFG, c=2, K=3).double()
    model.end = 3
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)  # so that no gradient is nothing
    return model


def gradients(model, dtype=None, plain=None):
    """{name: gradient} of an SFT loss: chains of 6, 2 and 4 latents behind prompts of unequal length, and one that the model ends."""
    rows = [data.Encoded([5 + n] * (2 + n), LINES[:n], [line + [1] for line in LINES[:n]], [], [6, 5, 1], "", free=not n) for n in (3, 1, 2, 0)]
    batch = data.collate(rows, model.K + 1, model)
    assert batch.n_latent.tolist() == [6, 2, 4, 6] and batch.free.tolist() == [False] * 3 + [True]
    eps = torch.randn(4, batch.n_candidate, CFG.n_embd, generator=torch.Generator().manual_seed(1)).to(model.policy.head.dtype)
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype, enabled=dtype is not None):
        if plain:
            patch.setattr(chain, "deferred", lambda model: nullcontext())
        loss = total_loss(rollout.sft_losses(model, batch, eps), batch.counts, 0.1)
    loss.backward()
    assert not any("forward" in vars(m) for m in model.modules())
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def error(got, want):
    return {n: float((got[n].double() - g).norm() / g.norm()) for n, g in want.items()}


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_autograds(model, recompute):
    want = gradients(model, plain=True)
    assert max(error(gradients(model.set_recompute(recompute)), want).values()) < 1e-10


def test_gradients_under_autocast_are_no_worse_than_autograds(model):
    want = gradients(model, plain=True)
    mine, theirs = (error(gradients(model.float(), torch.bfloat16, plain), want) for plain in (False, True))
    rms = lambda e: sum(x * x for x in e.values()) ** 0.5 / len(e) ** 0.5
    assert 1e-3 < rms(mine) < 1.2 * rms(theirs) < 0.2, (rms(mine), rms(theirs))


class WeightProducts(TorchDispatchMode):
    """Counts the products that have the shape of a weight."""
    def __init__(self, module):
        super().__init__()
        self.shapes, self.n = {tuple(m.weight.shape) for m in module.modules() if isinstance(m, nn.Linear)}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.n += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and tuple(out.shape) in self.shapes
        return out


@pytest.mark.parametrize("L", [1, 5])
def test_each_weight_gradient_is_one_product(model, L):
    h, eps = torch.randn(2, 3, 16, dtype=torch.float64)[0], torch.randn(3, L + 1, 16, dtype=torch.float64)
    thought, _ = chain.walk(model, h, model.policy.cache(3, L), torch.tensor([L, 1, L]), L, L + 1, eps)
    with WeightProducts(model) as products:
        thought.z.sum().backward()
    assert products.n == 7 * CFG.n_layer + 3
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    assert all(n.startswith(("decoder", "stop_head", "policy.model.embed")) for n in unused)


def test_gradcheck():
    def chain(x, W, b):
        layer = Deferred(SimpleNamespace(weight=W, bias=b))
        for _ in range(3):
            x = layer(x).tanh()
        return x + F.linear(x, W)  # another use of W

    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 1, 3), (3, 3), (3,))]
    assert torch.autograd.gradcheck(chain, inputs)
    assert torch.autograd.gradcheck(chain, [x.detach().requires_grad_(i != 1) for i, x in enumerate(inputs)])  # W is frozen


def test_a_chain_that_fails_leaves_the_model_as_it_was(model):
    with pytest.raises(RuntimeError), deferred(model):
        model.stop_head(torch.zeros(1, 3))
    assert not any("forward" in vars(m) for m in model.modules())
