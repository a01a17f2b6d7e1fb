"""A page that shows models thinking: every thought in words, the use of its result, all latents.

The page is tools/page.html with one JSON object put in: a self-contained file that loads nothing
from the network. Text of problems and models is data in it, never markup.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from kernels.common import upcast

from .. import reward
from ..decoder import thought_embeddings
from ..run import evaluate
from ..run.errors import NotWritten, UserError
from ..run.saved import replace_file
from . import edit
from .show import chain_rows, is_right

# A step's operation can colour its point on the page; other spellings count as the ASCII sign
OPERATION = re.compile(r"[+*/×÷−-]")
ASCII = {"×": "*", "÷": "/", "−": "-"}
N_READING = 3  # readings of a thought that the page shows


@dataclass
class Plane:
    """The two directions in which the thoughts of all problems differ most (PCA).

    A thought is a point of cD dimensions, its c latents side by side.
    """

    mean: torch.Tensor  # (cD,)
    basis: torch.Tensor  # (cD, 2) two orthogonal directions, scaled so that points are in [-1, 1]
    share: list  # of the variance, by direction

    @staticmethod
    def fit(chains, c):
        """The Plane of the thoughts of Chains; None if there are fewer than three thoughts."""
        # Two points are always on a line: a plane needs three
        x = torch.cat([as_points(chain, c) for chain in chains])
        if len(x) < 3:
            return None

        # The first two right singular vectors of the centred thoughts
        mean = x.mean(0)
        _, s, v = torch.linalg.svd(x - mean, full_matrices=False)
        directions = v[:2]  # (2, cD)

        # The sign of a direction is arbitrary: make its largest entry positive
        largest = directions.abs().argmax(1, keepdim=True)
        basis = directions.T * directions.gather(1, largest).sign()[:, 0]

        # A squared singular value is the variance along its direction, up to a constant. The scale
        # puts the largest coordinate at ±1. (clamp: all thoughts may be the same)
        share = s[:2].pow(2) / s.pow(2).sum().clamp(min=1e-30)
        scale = ((x - mean) @ basis).abs().max().clamp(min=1e-30)
        return Plane(mean, basis / scale, share.tolist())

    def path(self, chain, c):
        """[[x, y], …], a point for each thought of a Chain."""
        points = (as_points(chain, c) - self.mean) @ self.basis
        return [[round(value, 3) for value in point] for point in points.tolist()]


def as_points(chain, c):
    """The latents of a Chain -> (thoughts, cD)."""
    if not chain.n_latent:
        return chain.z.new_zeros(0, c * chain.z.shape[-1])
    return chain.z.float().reshape(chain.n_latent // c, -1)


# ---- what the page needs beside the chains ---------------------------------------------


def add_details(columns, model, tokenizer, sampled):
    """Fill in what only the page shows of the show.Columns of one run, its own chains first.

    sampled: per problem, a list of sampled Chains. All Chains must hold their latents.
    """
    own = columns[0]
    own.sampled = sampled

    # Edited thoughts are drawn in the plane of the run's own
    plane = Plane.fit(own.first_chains, model.c)
    for column in columns:
        column.plane = plane

        # Read all chains at once; where the edit does not apply there is none
        applied = [chain for chain in column.first_chains if chain]
        readings = iter(readings_of_chains(model, tokenizer, applied))
        column.readings = [next(readings) if chain else [] for chain in column.first_chains]


def readings_of_chains(model, tokenizer, chains):
    """The likeliest readings of Chains -> per chain and thought [(words, probability)]."""
    # All thoughts of all chains are read in one batch
    z = torch.cat([chain.z for chain in chains]).to(model.device)
    z = z.reshape(len(z) // model.c, model.c, z.shape[-1])  # (thoughts, c, D)
    readings = iter(read_latents(model, tokenizer, z))
    return [list(islice(readings, chain.n_latent // model.c)) for chain in chains]


def read_latents(model, tokenizer, z):
    """The likeliest readings of thoughts z (thoughts, c, D): a list of [(words, probability)].

    φ reads them. Without φ, a thought that is a hidden state (no VAE, no projection) is read as the
    words that the policy would write there, and any other thought has no reading.
    """
    if model.decode:
        eos = tokenizer.eos[0]
        texts = top_readings(model.decoder, z, eos, N_READING, model.longest)
        return [[(tokenizer.decode(ids), p) for ids, p in text] for text in texts]
    if model.vae or model.project:
        return [[] for _ in z]

    # A hidden state predicts a word, as the last state of the question does. Of the c latents of a
    # thought the first is read
    p, token = model.policy.logits(z[:, 0]).softmax(-1).topk(N_READING)
    readings = []
    for ids, probabilities in zip(token.tolist(), p.tolist()):
        words = [tokenizer.decode([i]).strip() for i in ids]
        readings.append(list(zip(words, probabilities)))
    return readings


@torch.no_grad()
def top_readings(decoder, z, eos, n, max_new):
    """The n likeliest texts of each step, by beam search.

    z (N, c, D) -> N lists of (ids, probability), likeliest first. Texts that do not end within
    max_new tokens are left out.
    """
    N = len(z)
    ended = [[] for _ in range(N)]  # of each step: (ids, log-probability) of texts that have ended
    if not N:
        return ended
    x, all_real = thought_embeddings(decoder, z)
    cache = decoder.cache(N, x.shape[1] + max_new)
    h = decoder(x, all_real, cache, last=1)[:, 0]

    total = z.new_zeros(N, 1)  # (N, beams) log-probability of each beam
    ids = [[[]] for _ in range(N)]  # of each step and beam: its words so far
    for _ in range(max_new):
        n_beam = total.shape[1]
        word_logp = upcast(decoder.logits(h)).log_softmax(-1).view(N, n_beam, -1)
        logp = total[..., None] + word_logp  # (N, n_beam, V)

        # every beam could end here
        for row, logp_eos in enumerate(logp[..., eos].tolist()):
            ended[row] += [(ids[row][b], beam_logp) for b, beam_logp in enumerate(logp_eos)]
            ended[row] = sorted(ended[row], key=lambda text: -text[1])[:n]
        logp[..., eos] = -torch.inf

        # or go on with the n likeliest words of all beams
        total, chosen = logp.flatten(1).topk(n)
        parent, token = chosen // logp.shape[-1], chosen % logp.shape[-1]
        ids = [
            [ids[row][b] + [word] for b, word in zip(parents, words)]
            for row, (parents, words) in enumerate(zip(parent.tolist(), token.tolist()))
        ]

        # a text only gets less likely as it grows: stop once no beam can overtake the n that have
        # ended
        best_open = total[:, 0].tolist()
        if all(len(texts) == n and texts[-1][1] >= best for texts, best in zip(ended, best_open)):
            break
        first_row = torch.arange(N, device=z.device)[:, None] * n_beam
        cache.keep((first_row + parent).flatten())
        one_real = torch.ones(N * n, 1, dtype=torch.bool, device=z.device)
        h = decoder(decoder.embed(token.flatten())[:, None], one_real, cache)[:, 0]
    return [[(words, math.exp(text_logp)) for words, text_logp in texts] for texts in ended]


# ---- HTML ------------------------------------------------------------------------------


def write(path, columns, problems):
    """Write the page to a file. Raises UserError, or NotWritten if the disk is full."""
    try:
        replace_file(path, render(columns, problems))
    except NotWritten as e:
        if e.full:
            raise
        raise UserError(f"{path}:0: cannot be written ({e.why}); choose another --html") from None


def render(columns, problems):
    """HTML of the page."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    data = json.dumps(page_data(columns, problems), ensure_ascii=False, separators=(",", ":"))

    # Escaped in JSON, no text can end the script element that holds it
    for mark in "<>&\u2028\u2029":
        data = data.replace(mark, f"\\u{ord(mark):04x}")
    return template.replace('"MINATP DATA"', data)


# ---- the data --------------------------------------------------------------------------


def page_data(columns, problems):
    """What the page shows, as one JSON object."""
    # One plane a run: that of its own chains, and edited chains refer to it
    own = [column for column in columns if column.plane and not column.edit]
    plane_index = {id(column.plane): i for i, column in enumerate(own)}
    return {
        # The columns: a run's own chains, or one edit of them
        "views": [
            {
                "name": column.name,
                "edit": column.edit,
                "edited": edit.parse(column.edit).places if column.edit else [],
                "plane": plane_index.get(id(column.plane)),
                **score(column, problems),
            }
            for column in columns
        ],
        "planes": [{"share": column.plane.share, "points": plane_points(column)} for column in own],
        # Each with its chains, in the order of the views
        "problems": [
            {
                "question": problem.question,
                "gold": problem.answer,
                "chains": [chain_data(column, i, problem) for column in columns],
            }
            for i, problem in enumerate(problems)
        ],
    }


def score(column, problems):
    """How many of a column's chains are right, of those whose answer is known."""
    # An edit may not apply to a problem, and a question typed by the user has no known answer
    judged = [
        is_right(chain, problem)
        for chain, problem in zip(column.first_chains, problems)
        if chain and problem.answer
    ]
    n_right = sum(judged)
    interval = evaluate.wilson(n_right, len(judged)) if judged else None
    return {"right": n_right, "of": len(judged), "ci95": interval}


def plane_points(column):
    """[[x, y, problem, thought, operation, result, words], …] of all thoughts of a run."""
    points = []
    for i, chain in enumerate(column.first_chains):
        path = column.plane.path(chain, column.c)
        # Without φ a thought has a place and no words
        words = chain.thoughts or [""] * len(path)
        for t, (place, text) in enumerate(zip(path, words)):
            points.append([*place, i, t, *operation_and_result(text), text])
    return points


def operation_and_result(step):
    """("+", 19.0) of "<<12+7=19>>"; "" and None if a step has none."""
    left = step.split("\n")[0].rpartition("=")[0]  # of its first line

    # The commonest sign speaks for a step with several
    operations = Counter(ASCII.get(sign, sign) for sign in OPERATION.findall(left))
    operation = operations.most_common(1)[0][0] if operations else ""
    return operation, reward.result_as_float(step)


def chain_data(column, i, problem):
    """The i-th problem's chain in a column: None if the edit does not apply."""
    chain = column.first_chains[i]
    if chain is None:
        return None
    c, plane = column.c, column.plane
    rows, row_of_step = chain_rows(chain, c, column.readings[i] if column.readings else [])

    # A link joins the row of a result to the row that uses it; one past the last row is the answer
    row_of_user = [*row_of_step, len(rows)]
    links = []
    for step, users in enumerate(reward.links(chain.steps, chain.answer)):
        links += [[row_of_step[step], row_of_user[user]] for user in users]

    # A chain that the stop head ended has one more decision than thoughts
    stopped = len(chain.stop_prob) > chain.n_latent // c
    data = {
        "rows": rows,
        "links": links,
        "text": chain.text,
        "answer": chain.answer,
        "ended": chain.ended,
        "latents": chain.n_latent,
        "tokens": chain.n_token,
        "right": is_right(chain, problem),
        "stop": round(chain.stop_prob[-1], 4) if stopped else None,
    }
    if plane:  # sampled chains are drawn in it, beside this one
        samples = column.sampled[i] if column.sampled else []
        data["path"] = plane.path(chain, c)
        data["sampled"] = [
            sample_data(sample, plane.path(sample, c), problem) for sample in samples
        ]
    return data


def sample_data(chain, path, problem):
    """A sampled chain, of which the page shows the path, the steps and the answer."""
    return {
        "path": path,
        "answer": chain.answer,
        "steps": chain.steps,
        "right": is_right(chain, problem),
    }
