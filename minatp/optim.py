"""The optimizer: AdamW for every parameter, or Muon for some and AdamW for the rest.

Muon is for the matrices of the layers, and of the latent head or CODI's projection. (Wμ and Wσ of
the latent head are one matrix.)

AdamW scales each element on its own, and a few directions of a matrix take up most of its step.
Muon makes all directions equal: if the SVD of the momentum G is U·S·Vᵀ, it steps along U·Vᵀ.

    m ← 0.95·m + 0.05·g        G = 0.05·g + 0.95·m  (Nesterov)
    W ← W − lr·(weight_decay·W + 0.2·√max(rows, columns)·U·Vᵀ)

No SVD is computed. Starting from X = G/‖G‖, five iterations of X ← a·X + (b·S + c·S²)·X, where
S = X·Xᵀ, bring every singular value above some 0.2 % of ‖G‖ to about 1 (0.7 to 1.2). An element
then moves by about 0.2·lr, as under AdamW, so one learning rate serves both. The products use the
dtype of the run (--dtype): in bfloat16 they take between half and a sixth of the time on a CPU with
AMX.

Sources: Jordan et al. 2024, kellerjordan.github.io/posts/muon (a, b, c); Liu et al. 2025, arXiv
2502.16982 (the 0.2). torch.optim.Muon always multiplies in bfloat16, and cannot skip a step.
"""

import torch

MOMENTUM = 0.95
A, B, C = 3.4445, -4.7750, 2.0315  # a, b, c


def build_optimizer(cfg, model):
    """The optimizer that --optimizer names, with weight decay on matrices only.

    With adamw it is a Muon that has no matrices.
    """
    matrices, others, muon_matrices = [], [], []
    for name, p in model.named_parameters():
        (matrices if p.dim() >= 2 else others).append(p)
        in_layer = ".layers." in name or name.startswith(("latent_head.", "projection."))
        if cfg.optimizer == "muon" and p.dim() == 2 and in_layer:
            muon_matrices.append(p)
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
    return Muon(muon_matrices, dtype, groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def orthogonalise(G, dtype=torch.float32):
    """Approximately U·Vᵀ, where G = U·S·Vᵀ; both (rows, columns). dtype: of the products."""
    is_tall = G.shape[0] > G.shape[1]
    X = G.t() if is_tall else G  # so that X·Xᵀ is the smaller of the two products
    X = (X / (X.norm() + 1e-7)).to(dtype)
    for _ in range(5):
        S = X @ X.t()
        S = torch.addmm(S, S, S, beta=B, alpha=C)  # b·S + c·S²
        X = torch.addmm(X, S, X, beta=A)  # a·X + (b·S + c·S²)·X
    return (X.t() if is_tall else X).to(G.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, but Muon for `muon_matrices`, matrices of its first group, with products in `dtype`.

    As in PyTorch's fused AdamW, two scalar tensors (or None) let the device decide by itself, so
    that the host need not wait to see the gradient:

    grad_scale   a step divides every gradient by it
    found_inf    a step changes nothing where it is 1
    """

    grad_scale = None
    found_inf = None

    def __init__(self, muon_matrices, dtype, groups, **adamw):
        super().__init__(groups, **adamw)
        self.muon_matrices, self.dtype = muon_matrices, dtype

    @torch.no_grad()
    def step(self):
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        for p in self.muon_matrices:
            if p.grad is None:
                continue
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            m = self.state[p]["momentum"]
            grad = p.grad if self.grad_scale is None else p.grad / self.grad_scale
            new_m = m.lerp(grad, 1 - MOMENTUM)
            direction = orthogonalise(grad.lerp(new_m, MOMENTUM), self.dtype)
            new_p = p - lr * (decay * p + 0.2 * max(p.shape) ** 0.5 * direction)
            for x, new in ((m, new_m), (p, new_p)):
                x.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, x, new))
            p.grad = None  # so that AdamW skips it
        super().step()
