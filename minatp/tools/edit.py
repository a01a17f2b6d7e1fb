"""Edits of a chain of thoughts (`sample.py --edit`): does the model use what it thinks?

    drop 2               leave out thought 2; the answer follows the thoughts that remain
    swap 1 2             thoughts 1 and 2 change places, and the model thinks on from there
    replace 2 zero       zeros take the place of thought 2, and the model thinks on from there
    replace 2 prior      a draw from N(0, I), the prior of the KL term, takes its place
    replace 2 next       the same thought of the next problem
    replace 2 <<3*2=6>>  a thought of another problem that φ reads as these words

Thoughts are counted from 1, and each is c latents. Those before an edit stay the same to the bit.
"""

import re
from dataclasses import dataclass

import torch

from ..problems import normal_form
from ..rollout import Forced
from ..run.errors import UserError
from ..run.splits import test_set

# How an edit is written; numbers count thoughts from 1
DROP = r"drop (?P<drop>\d+)"
SWAP = r"swap (?P<first>\d+) (?P<second>\d+)"
REPLACE = r"replace (?P<replace>\d+) (?P<source>.*\S)"
FORM = re.compile(rf"(?:{DROP}|{SWAP}|{REPLACE})\s*", re.DOTALL)


@dataclass
class Edit:
    """One edit, as the command line gives it."""

    text: str  # as it was written
    kind: str  # drop | swap | replace
    thought: int  # index of the thought, from 0
    other: int = 0  # swap: index of the thought that it changes places with
    source: str = ""  # replace: zero | prior | next | words

    @property
    def by_words(self):
        """Whether the new thought is chosen by what φ reads in it."""
        return self.kind == "replace" and self.source not in ("zero", "prior", "next")

    @property
    def places(self):
        """Indices, from 0, of the thoughts of the edited chain that the edit has put there."""
        if self.kind == "swap":
            return [self.thought, self.other]
        return [self.thought] if self.kind == "replace" else []

    @property
    def reach(self):
        """How many thoughts a chain must have for the edit to apply."""
        return max(self.thought, self.other) + 1


def parse(text):
    """ "swap 1 2" -> Edit. Raises UserError."""
    # Runs of spaces become one, as they do where words are compared (find_replacement)
    match = FORM.fullmatch(" ".join(text.split()))
    numbers = []
    if match:
        groups = ("drop", "first", "second", "replace")
        numbers = [int(match[name]) for name in groups if match[name]]

    # Thoughts are counted from 1, and a thought cannot change places with itself
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise UserError(
            f'command line: --edit {text!r} is not an edit; write "drop 2", "swap 1 2" or '
            '"replace 2 WITH", where WITH is zero, prior, next or the words of a thought'
        )

    # From here on, thoughts are counted from 0
    kind = match[0].split()[0]
    other = numbers[1] - 1 if kind == "swap" else 0
    return Edit(text, kind, numbers[0] - 1, other, match["source"] or "")


def donors(folder, shown):
    """Problems that `replace 1 WORDS` may take a thought from, if those that are shown have none.

    They are of the run's test set, without the problems `shown`; none if it has no test set.
    """
    questions = {normal_form(p.question) for p in shown}
    try:
        return [p for p in test_set(folder, 500) if normal_form(p.question) not in questions]
    except UserError:
        return []


def force(edit, model, chains, pool, seed=0):
    """The edited thoughts, as a rollout takes them -> (Forced, whether each chain was edited).

    chains, pool: Chains with their latents. A thought chosen by its words comes from pool. A chain
    with too few thoughts, or for which there is no thought to put in, stays the same. Raises
    UserError if no chain can be edited.
    """
    check(edit, model, chains)
    N, c, D = len(chains), model.c, model.policy.cfg.n_embd
    thoughts = [split(chain, c) for chain in chains]

    # Drawn for every chain, so that the draw of one does not depend on the lengths of others
    draws = torch.randn(N, c, D, generator=torch.Generator().manual_seed(seed))

    # Edit each chain: a list of thoughts, or None if the edit does not apply
    edited = []
    for i, own in enumerate(thoughts):
        new = None
        if len(own) >= edit.reach:
            # (the next problem of the last one is the first)
            following = thoughts[(i + 1) % N]
            others = [chain for chain in pool if chain is not chains[i]]
            new = edit_thoughts(edit, own, following, draws[i], others)
        edited.append(new)
    applies = [new is not None for new in edited]
    if not any(applies):
        raise no_chain_to_edit(edit, thoughts)

    # The latents to force, padded to cK. A chain that is not edited is forced to its own thoughts
    z = torch.zeros(N, c * model.K, D)
    n = torch.zeros(N, dtype=torch.long)
    for i, new in enumerate(edited):
        kept = thoughts[i] if new is None else new
        n[i] = c * len(kept)
        if kept:
            z[i, : n[i]] = torch.cat(kept)

    # After a drop the answer follows; so it does after a chain that was not edited. After a swap or
    # a replacement the model decides how to think on
    ends = torch.tensor([edit.kind == "drop" or not a for a in applies])
    return Forced(z, n, ends), applies


def check(edit, model, chains):
    """Raise UserError if the run cannot be edited so at all."""
    wrong = None
    if not any(chain.n_latent for chain in chains):
        wrong = "the run has no thoughts to edit; give --run one that has"
    elif edit.source == "prior" and not model.vae:
        wrong = "the run has no prior (it was trained without the VAE); try zero"
    elif edit.source == "next" and len(chains) < 2:
        wrong = "there is no next problem; ask for more than one"
    if wrong:
        raise UserError(f"command line: --edit {edit.text!r}: {wrong}")


def no_chain_to_edit(edit, thoughts):
    """The UserError that says why an edit applies to no chain."""
    why = f"no chain has a thought {edit.reach}; edit an earlier one"

    # Some chain is long enough: what is missing is a thought to put in
    is_long_enough = any(len(own) >= edit.reach for own in thoughts)
    if is_long_enough and edit.source == "next":
        why = (
            f"wherever a chain has a thought {edit.reach}, the next problem's has none; "
            "edit an earlier one, or ask for more problems"
        )
    elif is_long_enough:
        why = f"no thought of another problem is read as {edit.source!r}; name one that is shown"
    return UserError(f"command line: --edit {edit.text!r}: {why}")


def split(chain, c):
    """The thoughts of a Chain: a list of (c, D)."""
    return [chain.z[t : t + c] for t in range(0, chain.n_latent, c)]


def edit_thoughts(edit, own, following, draw, pool):
    """The thoughts to force on a chain whose own are `own`; None if there is no thought to put in.

    following: the thoughts of the next problem. draw (c, D): from the prior.
    """
    # The thoughts after the dropped one stay as they are: the model does not think them anew
    if edit.kind == "drop":
        return own[: edit.thought] + own[edit.thought + 1 :]

    # Thoughts after a swap or a replacement may build on what was there: the model thinks them anew
    if edit.kind == "swap":
        new = own[: edit.reach]
        new[edit.thought], new[edit.other] = new[edit.other], new[edit.thought]
        return new
    replacement = find_replacement(edit, following, draw, pool)
    return None if replacement is None else own[: edit.thought] + [replacement]


def find_replacement(edit, following, draw, pool):
    """The thought (c, D) to put in, or None if there is none."""
    # Zeros, the draw from N(0, I), or the thought in the same place of the next problem
    if edit.source == "zero":
        return torch.zeros_like(draw)
    if edit.source == "prior":
        return draw
    if edit.source == "next":
        return following[edit.thought] if len(following) > edit.thought else None

    # By words: the first thought of the pool that φ reads so, whatever its spaces
    for chain in pool:
        for words, thought in zip(chain.thoughts, split(chain, len(draw))):
            if " ".join(words.split()) == edit.source:
                return thought
    return None
