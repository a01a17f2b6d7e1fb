"""The built-in task: arithmetic word problems of 1 to 4 steps, so that everything runs with no download.

Four families: chains of events (serial: each step needs the one before) and chains of comparisons, told forwards or backwards (find
where to begin, then serial), nearly four problems in five; groups (two products in either order) and shopping (several valid orders of the
same steps).
Which set a problem belongs to is a hash of its question, so that no set can leak into another, for any seed. The same numbers may
come again under other names: `numbers` tells which do, and a summary gives the accuracy on those that do not as well.
"""
import hashlib
import random
import re
from dataclasses import replace

from .config import UserError
from .data import Problem

NAMES = "Ann Bob Cid Dan Eve Fay Gus Hal Ivy Jon Kim Leo Mia Ned Ora Pam".split()
THINGS = "pens cups eggs nuts figs hats keys maps".split()
TOP = 30        # no number is larger
MOST = 10**6    # problems of a set, of which it has more
LONGER = (5, 6)  # steps of the set "longer": more than any problem that is learned from
SETS = {"test": (0, 1), "longer": (0, 1), "validation": (2,), "labelled": (3, 4, 5, 6, 7, 8, 9), "answers": (10, 11, 12, 13, 14, 15)}  # of 16 buckets


def generate(which, n, seed):
    """n different problems of the set `which` (a key of SETS), the same for the same seed. Those of "answers" have no steps."""
    if n > MOST:
        raise UserError(f"built-in {which}:0: {n:,} problems are too many; ask for {MOST:,} at most")
    families, shares = ((lambda rng: events(rng, LONGER, (1, 1)),), (1,)) if which == "longer" else ((events, comparison, groups, shopping), (3, 3, 1, 1))
    rng = random.Random(f"{which}/{seed}")
    seen, out = set(), []
    while len(out) < n:
        p = rng.choices(families, shares)[0](rng)
        if p is None or bucket(p) not in SETS[which] or p.question in seen:
            continue
        seen.add(p.question)
        out.append(replace(p, steps=[] if which == "answers" else p.steps, at=f"built-in {which}:{len(out) + 1}"))
    return out


def bucket(p):
    """0 … 15 from a problem's question."""
    return hashlib.blake2b(p.question.encode(), digest_size=1).digest()[0] % 16


def numbers(p):
    """What is left of a problem without its words: its numbers in order, and the answer."""
    return (*re.findall(r"\d+", p.question), p.answer)


def problem(question, equations):
    """equations: (a, op, b) with numbers in hand. None where a result leaves 1 … TOP or a division leaves a rest."""
    steps = []
    for a, op, b in equations:
        value = apply(a, op, b)
        if not 1 <= value <= TOP:
            return None
        steps.append(f"<<{a}{op}{b}={value}>>")
    return Problem(question, steps, str(value))


def apply(a, op, b):
    """a op b; 0 where a division leaves a rest."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else 0}[op]


def events(rng, lengths=(1, 2, 3, 4), shares=(1, 2, 3, 5)):  # long ones leave 1 … TOP more often and are tried more often
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    total = rng.randint(2, 20)
    text, equations = [f"{name} has {total} {thing}."], []
    for _ in range(rng.choices(lengths, shares)[0]):
        op, b, line = rng.choice((
            ("+", b := rng.randint(2, 12), f"{name} buys {b}."), ("-", b := rng.randint(2, 12), f"{name} loses {b}."),
            ("+", b := rng.randint(2, 12), f"{name} finds {b} more."), ("-", b := rng.randint(2, 12), f"{name} sells {b}."),
            ("*", 2, "That doubles."), ("*", 3, "That triples."), ("/", 2, "Half of them break.")))
        equations.append((total, op, b))
        total = apply(total, op, b)
        text.append(line)
    return problem(" ".join(text) + f" How many {thing} has {name} now?", equations)


def comparison(rng):
    n, thing = rng.choices((1, 2, 3), (1, 2, 5))[0], rng.choice(THINGS)
    names = rng.sample(NAMES, n + 1)
    values = [rng.randint(2, 15)]
    lines, equations = [f"{names[0]} has {values[0]} {thing}."], []
    for other, name in zip(names, names[1:]):
        op, b, words = rng.choice((("+", b := rng.randint(2, 12), f"{b} more {thing} than"),
                                   ("-", b := rng.randint(2, 12), f"{b} fewer {thing} than"),
                                   ("*", 2, f"twice the {thing} of"), ("*", 3, f"thrice the {thing} of"),
                                   ("/", 2, f"half the {thing} of")))
        equations.append((values[-1], op, b))
        values.append(apply(*equations[-1]))
        lines.append(f"{name} has {words} {other}.")
    if rng.random() < 0.5:
        lines.reverse()
    if n > 1 and rng.random() < 0.4:  # the last two together: one step more
        equations.append((values[-2], "+", values[-1]))
        return problem(" ".join(lines) + f" How many {thing} have {names[-2]} and {names[-1]} together?", equations)
    return problem(" ".join(lines) + f" How many {thing} has {names[-1]}?", equations)


def groups(rng):
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c, d = (rng.randint(2, 7) for _ in range(4))
    first, second = (a, "*", b), (c, "*", d)
    equations = [first, second] if rng.random() < 0.5 else [second, first]
    text = f"{name} has {a} boxes of {b} {thing} and {c} bags of {d} {thing}."
    total = a * b + c * d
    equations.append((apply(*equations[0]), "+", apply(*equations[1])))
    if rng.random() < 0.5:
        e = rng.randint(2, 12)
        text += f" {name} loses {e}."
        equations.append((total, "-", e))
    return problem(text + f" How many {thing} has {name} now?", equations)


def shopping(rng):
    name, (x, y) = rng.choice(NAMES), rng.sample(THINGS, 2)
    money, a, p, b, q = rng.randint(5, TOP), *(rng.randint(2, 6) for _ in range(4))
    text = f"{name} has {money} coins and buys {a} {x} at {p} coins each"
    if rng.random() < 0.4:
        equations = [(a, "*", p), (money, "-", a * p)]
    else:
        text += f" and {b} {y} at {q} coins each"
        equations = rng.choice((
            [(a, "*", p), (b, "*", q), (a * p, "+", b * q), (money, "-", a * p + b * q)],
            [(b, "*", q), (a, "*", p), (b * q, "+", a * p), (money, "-", a * p + b * q)],
            [(a, "*", p), (money, "-", a * p), (b, "*", q), (money - a * p, "-", b * q)],
            [(b, "*", q), (money, "-", b * q), (a, "*", p), (money - b * q, "-", a * p)]))
    return problem(text + ". How many coins are left?", equations)
