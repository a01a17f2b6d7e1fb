"""The optimizer: AdamW, or Muon for the matrices of the layers and of the latent head and AdamW for the rest.

AdamW scales every element by itself, and a few directions of a matrix take most of its step. Muon makes all directions equal: the step is
U·Vᵀ of what its SVD would be, U·S·Vᵀ.

    m ← 0.95·m + 0.05·g;    G = 0.05·g + 0.95·m  (Nesterov);    W ← W − lr·(weight_decay·W + 0.2·√max(rows, columns)·U·Vᵀ)

No SVD is made: X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ, five times from X = G/‖G‖, brings every singular value to about 1 (0.7 to 1.2).
An element then moves by about 0.2·lr, as under AdamW, so that one learning rate serves both. Sources: Jordan et al. 2024,
kellerjordan.github.io/posts/muon (a, b, c); Liu et al. 2025, arXiv 2502.16982 (the 0.2). torch.optim.Muon multiplies in bfloat16 everywhere,
which many CPUs do slowly, and cannot leave a step out.
"""
import torch

MOMENTUM = 0.95


def build(cfg, model):
    """The optimizer of --optimizer, with weight decay on matrices alone."""
    named = list(model.named_parameters())
    matrices, others = ([p for _, p in named if (p.dim() >= 2) == wanted] for wanted in (True, False))
    hidden = [p for n, p in named if p.dim() == 2 and (".layers." in n or n.startswith("latent_head."))] if cfg.optimizer == "muon" else []
    return Muon(hidden, [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}],
                lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def orthogonal(G):
    """About U·Vᵀ of G = U·S·Vᵀ, (rows, columns)."""
    X = G if G.shape[0] <= G.shape[1] else G.t()  # A is the smaller of the two products
    X = (X / (X.norm() + 1e-7)).to(torch.bfloat16 if G.is_cuda else G.dtype)
    for _ in range(5):
        A = X @ X.t()
        X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return (X if G.shape[0] <= G.shape[1] else X.t()).to(G.dtype)


class Muon(torch.optim.AdamW):
    """AdamW but for `hidden`, matrices of its first group. With found_inf (a tensor, ()) at 1 a step changes nothing, as in fused AdamW."""
    found_inf = None

    def __init__(self, hidden, groups, **adamw):
        super().__init__(groups, **adamw)
        self.hidden = hidden

    @torch.no_grad()
    def step(self):
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        for p in self.hidden:
            if p.grad is None:
                continue
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            m = self.state[p]["momentum"]
            new = m.lerp(p.grad, 1 - MOMENTUM)
            moved = p - lr * (decay * p + 0.2 * max(p.shape)**0.5 * orthogonal(p.grad.lerp(new, MOMENTUM)))
            for x, y in ((m, new), (p, moved)):
                x.copy_(y if self.found_inf is None else torch.where(self.found_inf > 0, x, y))
            p.grad = None  # and AdamW leaves it alone
        super().step()
