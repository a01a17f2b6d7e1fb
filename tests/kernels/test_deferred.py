"""Weight gradients of the chain of latents: equal to autograd's, in one product for each weight."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear
from kernels.linear import (
    Linear,
    deferred_weight_gradients,
    kept_copy,
    product,
    side_by_side,
    together,
)
from minatp import chain, data, sft
from minatp.latent import ATP
from minatp.llama import LlamaConfig

CFG = LlamaConfig(
    vocab_size=64,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=16,
    n_inner=24,
    head_dim=4,
    bos=0,
    eos=(1,),
)
STEPS = [[7, 8], [9], [10, 4]]  # ids of each step's text
EOS = 1


@pytest.fixture
def model(monkeypatch):
    """A tiny model in float64, all of whose Linears are deferred."""
    monkeypatch.setattr(linear, "MIN_ELEMENTS", 0)
    torch.manual_seed(0)
    model = ATP(CFG, c=2, K=3).double()
    model.end = 3
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)  # so that no gradient is 0
    return model


def problem(n_steps):
    """n_steps labelled steps, behind a prompt whose length depends on n_steps. Without a step:
    answer only, and the model decides when to stop.
    """
    steps = STEPS[:n_steps]
    prompt = [5 + n_steps] * (2 + n_steps)
    return data.Encoded(
        prompt=prompt,
        lines=steps,
        step_texts=[step + [EOS] for step in steps],
        rest_text=[],
        answer=[6, 5, EOS],
        n_before_answer=1,
        source="",
        answer_only=n_steps == 0,
    )


def gradients(model, dtype=None, plain=False):
    """{name: gradient} of an SFT loss: chains of 6, 2 and 4 latents, and one that the model ends.

    dtype: autocast's. plain: without deferred gradients.
    """
    batch = data.collate([problem(n) for n in (3, 1, 2, 0)], model.K + 1, model)
    assert batch.thinking.n_latent.tolist() == [6, 2, 4, 6]
    assert batch.thinking.answer_only.tolist() == [False, False, False, True]

    generator = torch.Generator().manual_seed(1)
    eps = torch.randn(4, batch.thinking.n_candidate, CFG.n_embd, generator=generator)
    eps = eps.to(model.policy.head.dtype)

    model.zero_grad()
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with pytest.MonkeyPatch.context() as patch, autocast:
        if plain:
            patch.setattr(chain, "deferred_weight_gradients", nullcontext)
        loss = sft.total_loss(sft.sft_losses(model, batch, eps), batch.counts, {"kl": 0.1})
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def errors(got, want):
    """The relative L2 error of each gradient."""
    return {name: float((got[name].double() - g).norm() / g.norm()) for name, g in want.items()}


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_autograds(model, recompute):
    want = gradients(model, plain=True)
    got = gradients(model.set_recompute(recompute))
    assert max(errors(got, want).values()) < 1e-10


def test_gradients_under_autocast_are_no_worse_than_autograds(model):
    def rms_error(got):
        error = errors(got, want).values()
        return (sum(e * e for e in error) / len(error)) ** 0.5

    want = gradients(model, plain=True)
    model.float()
    deferred_error = rms_error(gradients(model, torch.bfloat16))
    plain_error = rms_error(gradients(model, torch.bfloat16, plain=True))
    assert 1e-3 < deferred_error < 1.2 * plain_error < 0.2, (deferred_error, plain_error)


class WeightProducts(TorchDispatchMode):
    """Counts the matrix products whose result has the shape of a weight."""

    def __init__(self, module):
        super().__init__()
        linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
        self.shapes = {tuple(m.weight.shape) for m in linears}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_product = func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if is_product and tuple(out.shape) in self.shapes:
            self.count += 1
        return out


@pytest.mark.parametrize("L", [1, 5])
@pytest.mark.parametrize("n_long", [2, 1024])
def test_each_weight_gradient_is_one_product(monkeypatch, model, L, n_long):
    monkeypatch.setattr(linear, "LONG", n_long)  # however many rows the chain has
    h = torch.randn(3, 16, dtype=torch.float64)
    eps = torch.randn(3, L + 1, 16, dtype=torch.float64)
    plan = chain.Plan(torch.tensor([L, 1, L]), L, n_candidate=L + 1, eps=eps)
    thought, _ = chain.walk(model, h, model.policy.cache(3, L), plan)
    with WeightProducts(model) as products:
        thought.z.sum().backward()

    # 7 Linears a layer, and 3 of the latent head
    assert products.count == 7 * CFG.n_layer + 3
    without_gradient = {name for name, p in model.named_parameters() if p.grad is None}
    not_in_the_chain = ("decoder", "stop_head", "policy.model.embed")
    assert all(name.startswith(not_in_the_chain) for name in without_gradient)


def test_gradcheck(monkeypatch):
    def three_calls(x, W, b):
        for _ in range(3):
            (x,) = product(x, [SimpleNamespace(weight=W, bias=b)])
            x = x.tanh()
        return x + F.linear(x, W)  # another use of W

    shapes = [(2, 1, 3), (3, 3), (3,)]
    x, W, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(three_calls, [x, W, b])
    assert torch.autograd.gradcheck(three_calls, [x, W.detach(), b])  # W is frozen
    monkeypatch.setattr(linear, "LONG", 2)  # each call has a product of its own
    assert torch.autograd.gradcheck(three_calls, [x, W, b])


def test_neighbours_in_memory_are_joined_without_a_copy():
    whole = torch.randn(2, 3, 10)
    parts = whole.split([4, 1, 5], -1)
    assert side_by_side(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(side_by_side(parts), whole)

    # others are copied
    a, b, c = parts
    assert torch.equal(side_by_side([b, a, c]), torch.cat([b, a, c], -1))
    assert torch.equal(side_by_side([a, b.clone(), c]), whole)


def add_one(p):
    with torch.no_grad():
        p.add_(1)


def step_of_the_optimizer(p):
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], fused=True).step()


@pytest.mark.parametrize("change", [add_one, step_of_the_optimizer])
def test_a_copy_stays_where_it_is_and_follows_its_weights(change):
    first, second = (nn.Parameter(torch.zeros(n, 3)) for n in (2, 4))
    copy = kept_copy([first, second], torch.bfloat16)
    address = copy.data_ptr()
    change(second)
    assert second.abs().min() > 0

    kept_copy([first, second], torch.float16)  # of another dtype, it has another place
    again = kept_copy([first, second], torch.bfloat16)
    assert again.data_ptr() == address
    assert torch.equal(again, torch.cat((first, second)).bfloat16())
    assert not again.requires_grad

    # unchanged, it is not written again
    version = again._version
    assert kept_copy([first, second], torch.bfloat16)._version == version

    # one weight in its own dtype needs no copy
    assert kept_copy([first], torch.float32).data_ptr() == first.data_ptr()


def test_rows_of_zeros_fill_a_copy_up_to_a_multiple():
    weight = nn.Parameter(torch.ones(5, 3))
    copy = kept_copy([weight], torch.float16, multiple=4)
    assert torch.equal(copy, torch.cat((torch.ones(5, 3), torch.zeros(3, 3))).half())
    add_one(weight)
    assert kept_copy([weight], torch.float16, multiple=4) is copy
    assert copy[:5].eq(2).all() and not copy[5:].any()

    # beside the copy without them; and none is needed if it is one already
    assert len(kept_copy([weight], torch.float16)) == 5
    assert kept_copy([weight], torch.float32, multiple=5).data_ptr() == weight.data_ptr()


class Products(TorchDispatchMode):
    """Counts products, of two matrices and of batches of them."""

    def __init__(self):
        super().__init__()
        self.counts = {"mm": 0, "bmm": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.counts:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_one_position_of_each_row_is_one_product_and_not_one_a_row(monkeypatch):
    """A batched product would read the weights once for every row."""
    monkeypatch.setattr(linear, "has_kernel", lambda *tensors: True)
    layers = Linear(3, 4, bias=False), Linear(3, 4, bias=False)
    x = torch.randn(8, 2, 3, requires_grad=True)
    last = x[:, 1:]  # whose rows are not side by side
    with Products() as products:
        parts = together(last, *layers)
    assert products.counts == {"mm": 1, "bmm": 0}

    # gradients that are neighbours in memory, as swiglu's backward pass leaves them
    dy = torch.randn(8, 8)
    grads = [dy[:, :4].view(8, 1, 4), dy[:, 4:].view(8, 1, 4)]
    with Products() as products:
        torch.autograd.grad(parts, last, grads)
    assert products.counts == {"mm": 1, "bmm": 0}


@pytest.mark.parametrize("shape", [(0, 3), (0, 2, 3), (2, 0, 3)])
def test_no_rows_have_a_product_of_no_rows(shape, monkeypatch):
    """As a batch without a stop that is labelled has."""
    monkeypatch.setattr(linear, "has_kernel", lambda *tensors: True)
    layer, x = Linear(3, 4), torch.zeros(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 4)
    y.sum().backward()
    assert x.grad.shape == shape and not layer.weight.grad.any()
    with torch.no_grad():
        assert layer(x).shape == y.shape


def test_a_chain_that_fails_defers_nothing_after_it(model):
    with pytest.raises(RuntimeError), deferred_weight_gradients():
        model.stop_head(torch.zeros(1, 3))
    assert linear.scope is None


def test_where_kernels_run_all_calls_share_a_node_while_one_is_alive(monkeypatch):
    monkeypatch.setattr(linear, "has_kernel", lambda *tensors: True)
    layer, x = Linear(3, 4), torch.randn(2, 3)
    first, second = layer(x), layer(x)
    assert len(linear.alive) == 1
    with WeightProducts(layer) as products:
        (first.sum() + second.sum()).backward()
    assert products.count == 1
    torch.testing.assert_close(layer.weight.grad, 2 * x.sum(0).expand(4, 3))
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 4.0))

    del first
    assert len(linear.alive) == 1
    del second
    assert len(linear.alive) == 0


def test_a_frozen_weight_has_no_gradient_and_no_product(monkeypatch):
    monkeypatch.setattr(linear, "MIN_ELEMENTS", 0)
    layer = Linear(3, 4).requires_grad_(False)
    x = torch.randn(2, 3, requires_grad=True)
    with deferred_weight_gradients(), WeightProducts(layer) as products:
        layer(x).sum().backward()
    assert products.count == 0
    assert torch.equal(x.grad, layer.weight.sum(0).expand(2, 3))


class Adapter(nn.Module):
    """Stands in a Linear's place and adds to its result, as LoRA does."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x) + 1


def test_a_module_in_the_place_of_a_merged_linear_is_called(monkeypatch):
    monkeypatch.setattr(linear, "has_kernel", lambda *tensors: True)
    x = torch.randn(2, 3)
    q, k = Linear(3, 4, bias=False), Linear(3, 2, bias=False)
    for parts in ([q, k], [Adapter(q), k]):
        for got, want in zip(together(x, *parts), [part(x) for part in parts], strict=True):
            torch.testing.assert_close(got, want)
