"""Edits of a chain of thoughts (`sample.py --edit`): does the model use what it thinks?

    drop 2             thought 2 is left out and the later ones move up; the answer follows what is left
    swap 1 2           the two change places; the model thinks on from there
    replace 2 zero     by nothing at all; the model thinks on from there. In place of zero also
              prior    a draw from N(0, I), as the KL term would have it
              next     the same thought of the next problem
              <<3*2=6>>  a thought that φ reads as these words, taken from another problem

Thoughts are counted from 1, and each is c latents. What stands before an edit stays as it was, to the bit.
"""

import re
from dataclasses import dataclass

import torch

from ..rollout import Forced
from ..run.errors import UserError

FORM = re.compile(
    r"(?:drop (?P<drop>\d+)|swap (?P<a>\d+) (?P<b>\d+)|replace (?P<i>\d+) (?P<by>.*\S))\s*",
    re.DOTALL,
)


@dataclass
class Edit:
    text: str  # as it was written
    kind: str  # drop | swap | replace
    at: int  # the thought, from 0
    other: int = 0  # swap: the one it changes places with
    by: str = ""  # replace: zero | prior | next | words

    @property
    def words(self):
        """Whether the new thought is named by what φ reads in it."""
        return self.kind == "replace" and self.by not in ("zero", "prior", "next")

    @property
    def places(self):
        """Where, from 0, the edited chain has thoughts that are not its own or not in their place."""
        return {"drop": [], "swap": [self.at, self.other], "replace": [self.at]}[self.kind]

    @property
    def reach(self):
        """Thoughts that a chain must have for the edit to apply."""
        return max(self.at, self.other) + 1


def parse(text):
    """ "swap 1 2" -> Edit. Raises UserError."""
    m = FORM.fullmatch(" ".join(text.split()))
    numbers = [int(m[k]) - 1 for k in ("drop", "a", "b", "i") if m[k]] if m else []
    if not m or min(numbers) < 0 or m["a"] == m["b"] and m["a"]:
        raise UserError(
            f'command line: --edit {text!r} is not an edit; write "drop 2", "swap 1 2" or "replace 2 WITH", '
            f"where WITH is zero, prior, next or the words of a thought"
        )
    kind = m[0].split()[0]
    return Edit(text, kind, numbers[0], numbers[-1] if kind == "swap" else 0, m["by"] or "")


def given(edit, model, chains, pool, seed=0):
    """(Given of all chains, whether the edit applies to each): a chain with too few thoughts, or with no donor, stays as it was.

    chains, pool: Chains with their latents; pool is where a thought of given words is looked for. Raises UserError where the
    model has no thoughts, or where no chain can be edited so.
    """
    c, cK, D = model.c, model.c * model.K, model.policy.cfg.n_embd
    for wrong, why in (
        (
            not any(chain.n_latent for chain in chains),
            "the run has no thoughts to edit; give one that has to --run",
        ),
        (
            edit.by == "prior" and not model.vae,
            "the run has no prior (it was trained without the VAE); try zero",
        ),
        (edit.by == "next" and len(chains) < 2, "there is no next problem; ask for more than one"),
    ):
        if wrong:
            raise UserError(f"command line: --edit {edit.text!r}: {why}")
    steps = [
        [chain.z[t : t + c] for t in range(0, chain.n_latent, c)] for chain in chains
    ]  # of (c, D)
    draws = torch.randn(len(chains), c, D, generator=torch.Generator().manual_seed(seed))
    z, n, applies = torch.zeros(len(chains), cK, D), torch.zeros(len(chains), dtype=torch.long), []
    for i, mine in enumerate(steps):
        new = None
        if len(mine) >= edit.reach:
            donor = (
                donated(edit, steps[(i + 1) % len(steps)], draws[i], pool)
                if edit.kind == "replace"
                else None
            )
            new = apply(edit, mine, donor)
        applies.append(new is not None)
        kept = mine if new is None else new
        n[i] = c * len(kept)
        if kept:
            z[i, : n[i]] = torch.cat(kept)
    if not any(applies):
        why = f"no chain has a thought {edit.reach}; edit an earlier one"
        if any(len(mine) >= edit.reach for mine in steps):
            why = f"no thought of these problems, or of others, is read as {edit.by!r}; name one that is shown"
        raise UserError(f"command line: --edit {edit.text!r}: {why}")
    ends = torch.tensor([edit.kind == "drop" or not a for a in applies])
    return Forced(z, n, ends), applies


def apply(edit, mine, donor):
    """The thoughts that are given after an edit; None where there is no donor."""
    if edit.kind == "drop":
        return mine[: edit.at] + mine[edit.at + 1 :]
    if edit.kind == "swap":
        new = mine[: edit.reach]
        new[edit.at], new[edit.other] = new[edit.other], new[edit.at]
        return new
    return None if donor is None else mine[: edit.at] + [donor]


def donated(edit, neighbour, draw, pool):
    """The thought (c, D) to put at edit.at, or None."""
    if edit.by == "zero":
        return torch.zeros_like(draw)
    if edit.by == "prior":
        return draw
    if edit.by == "next":
        return neighbour[edit.at] if len(neighbour) > edit.at else None
    c = len(draw)
    return next(
        (
            chain.z[c * s : c * (s + 1)]
            for chain in pool
            for s, text in enumerate(chain.thoughts)
            if " ".join(text.split()) == edit.by
        ),
        None,
    )
