"""The optimizer: the step of a matrix against its SVD, and which parameters take it."""
import pytest
import torch

from minatp import config, muon
from minatp.latent import ATP
from minatp.llama import LlamaConfig


@pytest.mark.parametrize("shape", [(1, 5), (5, 9), (9, 5), (64, 64)])
def test_a_step_is_orthogonal(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    U, S, Vt = torch.linalg.svd(G.double(), full_matrices=False)
    inside = U.t() @ optim.orthogonal(G).double() @ Vt.t()  # diagonal, and as it should be where G has that direction at all
    assert (inside - inside.diag().diag()).abs().max() < 1e-5
    assert inside.diag()[S > 0.02 * S[0]].sub(1).abs().max() < 0.35


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_which_parameters_are_muons(name):
    cfg = options.parse(["--optimizer", name, "--lr", "0.01", "--weight-decay", "0.5"], "")
    shape = LlamaConfig(vocab_size=40, n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_inner=48, head_dim=16, bos=0, eos=(1,))
    model = ATP(shape, c=1, K=2)
    optimizer, before = build_optimizer(cfg, model), {n: p.detach().clone() for n, p in model.named_parameters()}
    for seed, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    grads = {n: p.grad for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.02  # as a schedule does
    optimizer.step()
    for n, p in model.named_parameters():
        inside = name == "muon" and p.dim() == 2 and "embed" not in n and "stop_head" not in n
        assert optimizer.state[p].keys() == ({"momentum"} if inside else {"step", "exp_avg", "exp_avg_sq"}), n
        moved = (p.detach() - before[n]) / 0.02 + (0.5 * before[n] if p.dim() == 2 else 0)
        if inside:
            U, _, Vt = torch.linalg.svd(grads[n], full_matrices=False)
            want = -0.2 * max(p.shape)**0.5 * U @ Vt
            assert (moved * want).sum() / moved.norm() / want.norm() > 0.95, n
            assert 0.15 < moved.pow(2).mean().sqrt() < 0.25, n
        else:
            assert (moved + grads[n].sign()).abs().median() < 1e-2, n  # AdamW's first step
