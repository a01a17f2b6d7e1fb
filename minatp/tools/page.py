"""One page that shows models thinking: every thought in words, where its result is used, and all latents in a plane.

The page is minatp/page.html with one JSON object put in: a single file that asks nothing of the network. Text of problems and
models is data in it, never markup.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import decoder, reward
from ..run import evaluate
from ..run.errors import NotWritten, UserError
from ..run.saved import replace_file
from . import edit

OPERATION = re.compile(r"[+*/×÷−-]")
SAME = {"×": "*", "÷": "/", "−": "-"}


@dataclass
class View:
    """One column of the page: a run, or an edit of it."""

    name: str
    edit: str  # "" for the chains as they are
    chains: list  # a Chain per problem, with its latents; None where the edit does not apply
    sampled: list  # per problem, a list of Chains
    readings: list  # per problem and thought, [(words, probability)], likeliest first
    c: int  # latents per thought
    plane: "Plane"


@dataclass
class Plane:
    """The two directions in which the thoughts of all problems differ most. A thought is a point: its c latents, side by side."""

    mean: torch.Tensor  # (cD,)
    basis: (
        torch.Tensor
    )  # (cD, 2) orthonormal, over the scale that brings every point within [-1, 1]
    share: list  # of the variance, by direction

    @staticmethod
    def fit(chains, c):
        """PCA of the Chains' thoughts; None where there are fewer than three."""
        x = torch.cat([as_points(chain, c) for chain in chains])
        if len(x) < 3:
            return None
        mean = x.mean(0)
        _, s, v = torch.linalg.svd(x - mean, full_matrices=False)
        basis = (
            v[:2].T * v[:2].gather(1, v[:2].abs().argmax(1, keepdim=True)).sign()[:, 0]
        )  # one sign of the two that are possible
        share = s[:2].pow(2) / s.pow(2).sum().clamp(min=1e-30)
        return Plane(
            mean, basis / ((x - mean) @ basis).abs().max().clamp(min=1e-30), share.tolist()
        )

    def path(self, chain, c):
        """[[x, y], …], a point for each thought of a Chain."""
        return [
            [round(v, 3) for v in point]
            for point in ((as_points(chain, c) - self.mean) @ self.basis).tolist()
        ]


def as_points(chain, c):
    """The latents of a Chain -> (thoughts, cD)."""
    return (
        chain.z.float().reshape(chain.n_latent // c, -1)
        if chain.n_latent
        else chain.z.new_zeros(0, c * chain.z.shape[-1])
    )


def read(model, tokenizer, chains, n=3):
    """The likeliest n readings of each thought of Chains that hold their latents -> per chain and thought [(words, probability)].

    By φ; of a thought that is a hidden state (no VAE, no φ) the words that the policy would say there; [] for any other.
    """
    z = torch.cat([chain.z for chain in chains]).to(model.device)
    z = z.reshape(len(z) // model.c, model.c, z.shape[-1])  # (thoughts, c, D)
    if model.decode:
        found = iter(
            [(tokenizer.decode(ids), p) for ids, p in thought]
            for thought in decoder.top_readings(
                model.decoder, z, tokenizer.eos[0], n, model.longest
            )
        )
    elif not model.vae:
        p, ids = model.policy.logits(z[:, 0]).softmax(-1).topk(n)
        found = iter(
            [(tokenizer.decode([i]).strip(), q) for i, q in zip(*row)]
            for row in zip(ids.tolist(), p.tolist())
        )
    else:
        found = iter([] for _ in z)
    return [[next(found) for _ in range(chain.n_latent // model.c)] for chain in chains]


def write(path, views, problems):
    """The page, in the file `path`. Raises UserError where that cannot be written, NotWritten where the disk is full."""
    try:
        replace_file(path, render(views, problems))
    except NotWritten as e:
        raise (
            e
            if e.full
            else UserError(f"{path}:0: cannot be written ({e.why}); choose another --html")
        )


def render(views, problems):
    """HTML of the page."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    text = json.dumps(record(views, problems), ensure_ascii=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":  # no text can end the script that holds it
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return template.replace('"MINATP DATA"', text)


def record(views, problems):
    """What the page shows, as one JSON object."""
    planes = {id(v.plane): v for v in views if v.plane and not v.edit}
    place = {key: i for i, key in enumerate(planes)}
    return {
        "views": [
            {
                "name": v.name,
                "edit": v.edit,
                "edited": edit.parse(v.edit).places if v.edit else [],
                "plane": place.get(id(v.plane)),
                **score(v.chains, problems),
            }
            for v in views
        ],
        "planes": [{"share": v.plane.share, "points": points(v)} for v in planes.values()],
        "problems": [
            {
                "question": p.question,
                "gold": p.answer,
                "chains": [None if v.chains[i] is None else chain_record(v, i, p) for v in views],
            }
            for i, p in enumerate(problems)
        ],
    }


def score(chains, problems):
    """How many are right, of those that have an answer to be compared with."""
    judged = [
        reward.accuracy(c.text, p.answer)
        for c, p in zip(chains, problems)
        if c is not None and p.answer
    ]
    return {
        "right": int(sum(judged)),
        "of": len(judged),
        "ci95": evaluate.wilson(sum(judged), len(judged)) if judged else None,
    }


def points(view):
    """[[x, y, problem, thought, operation, result, words], …] of all thoughts of a run."""
    out = []
    for i, chain in enumerate(view.chains):
        words = chain.thoughts or [""] * (chain.n_latent // view.c)
        out += [
            [*xy, i, t, *kind(text), text]
            for t, (xy, text) in enumerate(zip(view.plane.path(chain, view.c), words))
        ]
    return out


def kind(step):
    """("+", 19.0) of "<<12+7=19>>": its operation and its result, "" and None where there are none."""
    left = step.split("\n")[0].rpartition("=")[0]
    signs = Counter(SAME.get(s, s) for s in OPERATION.findall(left))
    return signs.most_common(1)[0][0] if signs else "", reward.result_as_float(step)


def chain_record(view, i, problem):
    """One chain of the page: rows (thoughts and written lines), links between rows (one past the last: the answer) and the rest."""
    chain = view.chains[i]
    rows, counted = rows_of(chain, view.c, view.readings[i] if view.readings else [])
    at = [*counted, len(rows)]
    out = {
        "rows": rows,
        "links": [
            [counted[a], at[b]]
            for a, used in enumerate(reward.links(chain.steps, chain.answer))
            for b in used
        ],
        "counted": counted,
        "text": chain.text,
        "answer": chain.answer,
        "ended": chain.ended,
        "latents": chain.n_latent,
        "tokens": chain.n_token,
        "right": bool(reward.accuracy(chain.text, problem.answer)) if problem.answer else None,
        "stop": round(chain.stop_prob[-1], 4)
        if len(chain.stop_prob) > chain.n_latent // view.c
        else None,
    }
    if view.plane:
        out["path"] = view.plane.path(chain, view.c)
        out["sampled"] = [
            {
                "path": view.plane.path(s, view.c),
                "answer": s.answer,
                "steps": s.steps,
                "right": bool(reward.accuracy(s.text, problem.answer)) if problem.answer else None,
            }
            for s in (view.sampled[i] if view.sampled else [])
        ]
    return out


def rows_of(chain, c, readings=()):
    """(rows, the row of each of chain.steps). Only the first line of a thought has its numbers."""
    rows, counted = [], []
    for t in range(chain.n_latent // c):
        lines = (
            [line for line in chain.thoughts[t].split("\n") if line.strip()]
            if chain.thoughts
            else []
        )
        counted += range(len(rows), len(rows) + len(lines))
        rows += [{"text": line, "thought": t} for line in lines or [""]]
        first = rows[-max(1, len(lines))]
        if t < len(chain.stop_prob):
            first["stop"] = round(chain.stop_prob[t], 4)
        if t < len(chain.sigma):
            first["sigma"] = round(chain.sigma[t], 4)
        told = readings[t] if t < len(readings) else []
        first["p"] = next(
            (round(p, 4) for words, p in told if chain.thoughts and words == chain.thoughts[t]),
            None,
        )
        first["or"] = [
            [words, round(p, 4)]
            for words, p in told
            if not chain.thoughts or words != chain.thoughts[t]
        ][:3]
    written = [line for line in chain.text.partition("### ")[0].split("\n") if line.strip()]
    counted += range(len(rows), len(rows) + len(written))
    return rows + [{"text": line} for line in written], counted
