"""The optimizer: the step of a matrix against its SVD, and which parameters take which step."""

import pytest
import torch

from minatp import optim
from minatp.latent import ATP
from minatp.llama import LlamaConfig
from minatp.optim import build_optimizer, orthogonalise
from minatp.run import options

from small import small_model


@pytest.mark.parametrize("shape", [(1, 5), (5, 9), (9, 5), (64, 64)])
def test_a_step_is_orthogonal(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    U, S, Vt = torch.linalg.svd(G.double(), full_matrices=False)

    # in the basis of G's singular vectors the step is diagonal, and about 1 in every direction that
    # G has at all
    in_basis = U.t() @ orthogonalise(G).double() @ Vt.t()
    diagonal = in_basis.diag()
    assert (in_basis - diagonal.diag()).abs().max() < 1e-5
    assert (diagonal[S > 0.02 * S[0]] - 1).abs().max() < 0.35

    # in bfloat16 it is nearly the same
    in_bfloat16 = orthogonalise(G, torch.bfloat16)
    assert in_bfloat16.dtype == G.dtype
    assert (in_bfloat16 - orthogonalise(G)).norm() < 0.03 * in_bfloat16.norm()


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_muon_multiplies_in_the_dtype_of_the_run(name, monkeypatch):
    seen = []
    monkeypatch.setattr(optim, "orthogonalise", lambda G, dtype: seen.append(dtype) or G)
    optimizer, _ = small_optimizer("muon", "--dtype", name)
    optimizer.step()
    assert set(seen) == {getattr(torch, name)}


LR = 0.02
WEIGHT_DECAY = 0.5
MUON_STATE = {"momentum"}
ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq"}


def small_optimizer(optimizer_name, *others):
    """A small model with random gradients: (optimizer, model). others: options."""
    options_given = ["--optimizer", optimizer_name, "--lr", "0.01", *others]
    cfg = options.parse([*options_given, "--weight-decay", str(WEIGHT_DECAY)], "")
    llama = LlamaConfig(
        vocab_size=40,
        n_layer=1,
        n_head=2,
        n_kv_head=1,
        n_embd=32,
        n_inner=48,
        head_dim=16,
        bos=0,
        eos=(1,),
    )
    torch.manual_seed(0)
    model = ATP(llama, c=1, K=2)
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = LR  # a schedule changes it between steps
    for seed, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return optimizer, model


def one_step(optimizer_name):
    """Take the first step of a small model.

    Returns (optimizer, model, moved, grads): the last two are {parameter's name: tensor}, and
    `moved` is the step divided by the learning rate, without the weight decay.
    """
    optimizer, model = small_optimizer(optimizer_name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    optimizer.step()

    moved = {}
    for name, p in model.named_parameters():
        moved[name] = (p.detach() - before[name]) / LR
        if p.dim() == 2:
            moved[name] += WEIGHT_DECAY * before[name]
    return optimizer, model, moved, grads


@pytest.mark.parametrize("optimizer_name", ["muon", "adamw"])
def test_which_parameters_are_muons(optimizer_name):
    optimizer, model, moved, grads = one_step(optimizer_name)
    for name, p in model.named_parameters():
        is_hidden = p.dim() == 2 and "embed" not in name and "stop_head" not in name
        if optimizer_name == "muon" and is_hidden:
            assert optimizer.state[p].keys() == MUON_STATE, name
            check_muon_step(name, moved[name], grads[name])
        else:
            assert optimizer.state[p].keys() == ADAMW_STATE, name
            # AdamW's first step is the sign of the gradient
            assert (moved[name] + grads[name].sign()).abs().median() < 1e-2, name


def test_the_matrices_of_a_projection_are_muons():
    model, _ = small_model(method="codi")
    optimizer = build_optimizer(options.parse(["--method", "codi"], ""), model)
    muon_ids = {id(p) for p in optimizer.muon_matrices}
    of_projection = dict(model.projection.named_parameters())
    assert len(of_projection) == 6
    for name, p in of_projection.items():
        assert (id(p) in muon_ids) == (p.dim() == 2), name
    assert id(model.policy.model.embed_tokens.weight) not in muon_ids


def check_muon_step(name, moved, grad):
    """Its direction is −U·Vᵀ, and an element moves by about 0.2, as under AdamW."""
    U, _, Vt = torch.linalg.svd(grad, full_matrices=False)
    expected = -0.2 * max(grad.shape) ** 0.5 * U @ Vt
    cosine = (moved * expected).sum() / moved.norm() / expected.norm()
    assert cosine > 0.95, name
    assert 0.15 < moved.pow(2).mean().sqrt() < 0.25, name


@pytest.mark.parametrize("optimizer_name", ["muon", "adamw"])
def test_a_step_divides_gradients_by_grad_scale(optimizer_name):
    """By a power of two, so that nothing is rounded; twice, as a first step is nearly a sign."""
    weights = []
    for scaled_before in (False, True):
        optimizer, model = small_optimizer(optimizer_name)
        for scale in (1.0, 64.0):
            optimizer.grad_scale = None if scaled_before else torch.tensor(scale)
            for seed, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
                p.grad /= scale if scaled_before else 1.0
            optimizer.step()
        weights.append(list(model.parameters()))
    assert all(map(torch.equal, *weights))
