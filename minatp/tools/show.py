"""What sample.py prints: chains of thoughts in a terminal, and as JSON.

    Column          what one run, or one edit of its chains, makes of all problems
    chain_rows      a chain line by line, with the facts about each thought
    print_json      one JSON object per chain
    print_chains    the chains of all columns in a terminal, problem by problem
    summary         the closing line of a column

tools/page.py draws the same columns as HTML.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import reward
from ..run import evaluate


@dataclass
class Column:
    """What one run, or one edit of its chains, makes of all problems."""

    run: str  # a short name
    edit: str  # the edit as it was written; "" for the run's own chains
    c: int  # latents per thought
    chains: list  # per problem, a list of Chains; [] if the edit does not apply
    seconds: float  # that solving took
    n_position: int  # positions of the policy in that time, also of chains that were not elected

    # For the page alone (tools/page.py)
    sampled: list = field(default_factory=list)  # per problem, a list of sampled Chains
    readings: list = field(default_factory=list)  # per problem and thought, [(words, probability)]
    plane: Any = None  # a page.Plane: the run's thoughts in two dimensions

    @property
    def name(self):
        return f"{self.run} · {self.edit}" if self.edit else self.run

    @property
    def first_chains(self):
        """Per problem its first Chain; None if the edit does not apply."""
        return [chains[0] if chains else None for chains in self.chains]


def short_names(folders):
    """The last part of each folder's path; all of it if two folders have the same last part."""
    short = []
    for folder in folders:
        path = Path(folder).absolute()

        # out/sft/final holds the model of the run out/sft
        if path.name == "final":
            path = path.parent
        short.append(path.name or folder)
    return [folder if short.count(name) > 1 else name for folder, name in zip(folders, short)]


def count_positions(chains):
    """Positions of the policy that Chains took: a latent is one, as a token is."""
    return sum(chain.n_latent + chain.n_token for chain in chains)


# ---- one chain -------------------------------------------------------------------------


def chain_rows(chain, c, readings=()):
    """A Chain line by line -> (rows, the row of each of chain.steps).

    A row is a dict with its "text" and, if it is a line of a thought, "thought", the thought's
    index. The first row of a thought also has the `thought_facts`. A thought without words is one
    row with an empty text.
    """
    rows, row_of_step = [], []

    # The thoughts: usually one line each, but φ may write several, or none
    for t in range(chain.n_latent // c):
        lines = lines_of(chain.thoughts[t]) if chain.thoughts else []
        first = len(rows)
        # (A thought without words has a row, and is no step)
        row_of_step += range(first, first + len(lines))
        rows += [{"text": line, "thought": t} for line in lines or [""]]
        rows[first] |= thought_facts(chain, t, readings[t] if t < len(readings) else [])

    # The steps that were written, up to the answer
    written = lines_of(chain.text.partition("### ")[0])
    row_of_step += range(len(rows), len(rows) + len(written))
    rows += [{"text": line} for line in written]
    return rows, row_of_step


def lines_of(text):
    """The lines of a text that are not blank."""
    return [line for line in text.split("\n") if line.strip()]


def thought_facts(chain, t, readings):
    """The t-th thought in numbers, a dict. readings: [(words, probability)], likeliest first.

    "stop": the probability of stopping before this thought. "sigma": the mean σ of its latents.
    "p": the probability of the words that φ reads. "or": the runners-up, [[words, probability]].
    """
    # Without a stop head or the VAE there is no such number
    facts = {}
    if t < len(chain.stop_prob):
        facts["stop"] = round(chain.stop_prob[t], 4)
    if t < len(chain.sigma):
        facts["sigma"] = round(chain.sigma[t], 4)

    # The greedy reading may not be the likeliest one, and may be missing among the readings
    words = chain.thoughts[t] if chain.thoughts else None
    rounded = [[text, round(p, 4)] for text, p in readings]
    facts["p"] = next((p for text, p in rounded if text == words), None)
    facts["or"] = [[text, p] for text, p in rounded if text != words][:3]
    return facts


def is_right(chain, problem):
    """Whether a Chain has the right answer; None if no answer is known."""
    return bool(reward.accuracy(chain.text, problem.answer)) if problem.answer else None


# ---- JSON ------------------------------------------------------------------------------


def print_json(columns, problems):
    """One JSON object per chain, a line each."""
    for i, problem in enumerate(problems):
        for column in columns:
            for chain in column.chains[i]:
                print(json.dumps(as_record(problem, chain, column)))


def as_record(problem, chain, column):
    """One chain as a JSON object."""
    return {
        "run": column.run,
        "edit": column.edit,
        "question": problem.question,
        "thoughts": chain.thoughts,
        # The thoughts, then the lines written before the answer; "coherent" has a value for each
        "steps": chain.steps,
        "coherent": [bool(users) for users in reward.links(chain.steps, chain.answer)],
        "stop_prob": chain.stop_prob,
        "sigma": chain.sigma,
        "text": chain.text,
        "answer": chain.answer,
        "gold": problem.answer or None,
        "right": is_right(chain, problem),
        "latents": chain.n_latent,
        "tokens": chain.n_token,
    }


# ---- terminal --------------------------------------------------------------------------

STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}  # ANSI codes


@dataclass
class Paint:
    """paint("green", text): a text in a style, if the terminal shows styles."""

    on: bool

    def __call__(self, style, text):
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if self.on else text


def print_chains(columns, problems, paint):
    """Each question, and below it the chains of every column."""
    for i, problem in enumerate(problems):
        print("\n" + paint("bold", problem.question))
        for column in columns:
            chains = column.chains[i]
            # A single column needs no heading
            if len(columns) > 1:
                note = "" if chains else ": does not apply"
                print(paint("dim", f"  {column.name}{note}"))
            for chain in chains:
                print("\n".join(draw(problem, chain, column.c, paint)))


def draw(problem, chain, c, paint):
    """The lines that show one Chain. c: latents per thought."""
    rows, row_of_step = chain_rows(chain, c)
    # row -> the later steps, or the answer, that use it
    used = dict(zip(row_of_step, reward.links(chain.steps, chain.answer)))

    # Texts are padded to one width, so that the facts align
    width = max([len(row["text"]) for row in rows] + [12])

    def draw_row(i):
        row, facts = rows[i], []
        if i in used:  # not the first line of an empty thought
            facts.append(paint("green", "used  ") if used[i] else paint("yellow", "unused"))
        if "stop" in row:
            facts.append(f"stop {row['stop']:.3f}")
        if "sigma" in row:
            facts.append(f"σ {row['sigma']:.3f}")
        mark = "◆" if "thought" in row else "·"
        return f"  {mark} {paint('cyan', row['text'].ljust(width))}  {'  '.join(facts)}"

    # The thoughts, in φ's words
    lines = [draw_row(i) for i, row in enumerate(rows) if "thought" in row]
    if chain.n_latent and not chain.thoughts:
        lines.append(
            paint("dim", f"  {chain.n_latent} latents without words (the run has no decoder LM)")
        )

    # The stop head's last decision, if that ended the thinking
    if len(chain.stop_prob) > chain.n_latent // c:
        blank = " " * len("unused")  # to align the probability with those above
        lines.append(f"  ■ {'stop'.ljust(width)}  {blank}  stop {chain.stop_prob[-1]:.3f}")

    # The steps that were written, and the answer
    lines += [draw_row(i) for i, row in enumerate(rows) if "thought" not in row]
    lines.append(draw_answer(problem, chain, paint))
    return lines


def draw_answer(problem, chain, paint):
    """The line with the answer, and whether it is right."""
    # Without "### " there is no answer: show all that was written
    answer = chain.text if chain.answer is None else chain.answer
    line = f"  → {paint('bold', answer)}"

    # right is None for a question whose answer is not known
    right = is_right(chain, problem)
    if right:
        line += paint("green", "  ✓")
    elif right is not None:
        line += paint("red", f"  ✗ it is {problem.answer}")
    if not chain.ended:
        line += paint("dim", "  (cut off)")
    return line


# ---- closing lines ---------------------------------------------------------------------


def summary(column, columns, problems):
    """The closing line of one of the columns."""
    # How many are right, of those whose answer is known
    judged = [
        is_right(chain, problem)
        for problem, chains in zip(problems, column.chains)
        for chain in chains
        if problem.answer
    ]
    right = f"{sum(judged)} of {len(judged)} right · " if judged else ""

    # An edit is compared with the run's own chains, which are its first column
    if column.edit:
        own = next(other for other in columns if other.run == column.run)
        return f"{column.name}: {effect_of_edit(column, own, problems, right)}"
    return f"\n{right}{lengths_and_speed(column)} · {column.name}"


def effect_of_edit(edited, own, problems, right):
    """What an edit changed, against the run's own chains of the same problems.

    right: how many of the edited chains are right, in words.
    """
    # The problems to which the edit applies
    rows = [
        (problem, before, after)
        for problem, before, after in zip(problems, own.first_chains, edited.first_chains)
        if after
    ]
    n_changed = sum(not evaluate.agree(before, after) for _, before, after in rows)
    text = f"another answer in {n_changed} of {len(rows)}"

    # `right` is of the edited chains; count the unedited ones of the same problems
    if right:
        n_right = sum(bool(is_right(before, problem)) for problem, before, _ in rows)
        text += f" · {right}{n_right} unedited"
    return text


def lengths_and_speed(column):
    """Latents and tokens of the chains, and how fast they came."""
    chains = [chain for chains in column.chains for chain in chains]
    n_latent = sum(chain.n_latent for chain in chains)
    n_token = sum(chain.n_token for chain in chains)
    return (
        f"{n_latent / len(chains):.1f} latents + {n_token / len(chains):.1f} tokens a chain · "
        f"{column.n_position / column.seconds:,.0f} tokens/s"
    )
