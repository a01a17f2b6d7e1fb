"""A small model, and the options of small runs, for tests.

The runs take seconds. They are long enough to pass through every stage of the curriculum, and too
short to learn anything.
"""

import torch

from minatp import problems
from minatp.data import left_pad
from minatp.run import options
from minatp.run.build import build

SMALL_MODEL = [
    *("--n-layer", "2", "--n-embd", "32", "--n-inner", "48", "--decoder-layers", "1"),
    *("--K", "2", "--c", "2"),
]
SMALL = [
    *SMALL_MODEL,
    *("--labelled", "160", "--answers", "40", "--val-size", "8", "--test-size", "24"),
    *("--batch-size", "8", "--epochs", ".2", "--optimizer", "adamw"),
    *("--log-every", "2", "--save-every", "3", "--device", "cpu"),
]
SMALL_RL = [
    *("--stage", "rl"),
    *("--labelled", "160", "--answers", "40", "--val-size", "8", "--test-size", "24"),
    *("--batch-size", "4", "--G", "4", "--updates", "12"),
    *("--log-every", "2", "--save-every", "5", "--val-every", "6", "--device", "cpu"),
]


def small_model(seed=0, method="atp", more=()):
    """(model, tokenizer): untrained, but with no weight left at zero. more: options."""
    torch.manual_seed(seed)
    cfg = options.parse([*SMALL_MODEL, "--method", method, *more], "")
    model, tokenizer = build(cfg, problems.generate("labelled", 160, 0))
    if model.vae:
        torch.nn.init.normal_(model.latent_head.gaussian.weight, std=0.1)
    return model, tokenizer


def gradients_of(model):
    """{name: gradient} of the parameters that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def make_ragged(model, tokenizer):
    """Give a model weights so large and random that its chains stop and end at all lengths.

    Changes both arguments. Returns (model, tokenizer).
    """
    generator = torch.Generator().manual_seed(3)
    parameters = [
        *model.policy.parameters(),
        *model.stop_head.parameters(),
        model.latent_head.gaussian.weight,
    ]
    for p in parameters:
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4, generator=generator)
    torch.nn.init.zeros_(model.stop_head[2].bias)

    # every other token ends an answer
    model.policy.cfg.eos = tuple(range(1, 300, 2))
    tokenizer.eos = model.policy.cfg.eos
    return model, tokenizer


def padded_prompts(tokenizer, n, seed):
    """(ids (n, Tq), mask (n, Tq)): n questions of the test set, padded on the left."""
    questions = [p.question for p in problems.generate("test", n, seed)]
    return left_pad(tokenizer.prompts(questions), tokenizer.end)
