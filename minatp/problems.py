"""Problem, and the built-in task: word problems of 1 to 4 steps, with nothing to download.

There are four families. In two of them each step needs the one before: events, and comparisons,
told forwards or backwards (then the start has to be found first). They make up nearly four problems
in five. The others are groups (two products, in either order) and shopping (the same steps in
several valid orders).

A hash of its question decides which set a problem belongs to, so that no set can leak into another,
whatever the seed. The same numbers may return under other names: `numbers` is a problem without its
words, and a run's summary also gives the accuracy on numbers that are in no training problem.
"""

import hashlib
import random
import re
import unicodedata
from dataclasses import dataclass, field, replace


@dataclass
class Problem:
    question: str
    steps: list  # strings such as "<<12+7=19>>"; free text is allowed
    answer: str
    source: str = field(default="problem:1", compare=False)  # "path:line", for messages


# What word processors write for ' and "
PLAIN_QUOTES = str.maketrans(dict.fromkeys("‘’‚‛′´`", "'") | dict.fromkeys("“”„‟″", '"'))


def normal_form(text):
    """A text as it is compared with others: two spellings of one question become equal.

    It is in Unicode's NFKC, with plain quotes, no upper case, and single spaces for white space.
    """
    text = unicodedata.normalize("NFKC", text.translate(PLAIN_QUOTES))
    return " ".join(text.casefold().split())


NAMES = "Ann Bob Cid Dan Eve Fay Gus Hal Ivy Jon Kim Leo Mia Ned Ora Pam".split()
THINGS = "pens cups eggs nuts figs hats keys maps".split()
LARGEST = 30  # no number in a problem is larger
MOST = 10**6  # the most problems that can be asked for; each set has more
SETS = {  # name -> its buckets, of 16
    "test": (0, 1),
    "longer": (0, 1),  # problems of 5 and 6 steps, more than any training problem has
    "validation": (2,),
    "labelled": (3, 4, 5, 6, 7, 8, 9),
    "answers": (10, 11, 12, 13, 14, 15),
}


def generate(which, n, seed):
    """n different problems of the set `which` (a key of SETS), the same for the same seed.

    "answers" have no steps. Raises ValueError if n is more than MOST.
    """
    if n > MOST:
        raise ValueError(
            f"built-in {which}:0: {n:,} problems are too many; ask for {MOST:,} at most"
        )
    families, shares = (events, comparison, groups, shopping), (3, 3, 1, 1)
    if which == "longer":
        families, shares = (longer_events,), (1,)

    rng = random.Random(f"{which}/{seed}")
    seen, problems = set(), []
    while len(problems) < n:
        p = rng.choices(families, shares)[0](rng)
        if p is None or bucket(p) not in SETS[which] or p.question in seen:
            continue
        seen.add(p.question)
        steps = [] if which == "answers" else p.steps
        problems.append(replace(p, steps=steps, source=f"built-in {which}:{len(problems) + 1}"))
    return problems


def bucket(p):
    """0 … 15, from a problem's question."""
    return hashlib.blake2b(p.question.encode(), digest_size=1).digest()[0] % 16


def numbers(p):
    """A problem without its words: its numbers in order, and the answer."""
    return (*re.findall(r"\d+", p.question), p.answer)


def make_problem(question, equations):
    """equations: (a, op, b), whole numbers.

    None if a result is not within 1 … LARGEST or a division leaves a remainder.
    """
    steps = []
    for a, op, b in equations:
        value = calculate(a, op, b)
        if not 1 <= value <= LARGEST:
            return None
        steps.append(f"<<{a}{op}{b}={value}>>")
    return Problem(question, steps, str(value))


def calculate(a, op, b):
    """a op b; 0 if a division leaves a remainder."""
    if op == "/":
        return a // b if b and a % b == 0 else 0
    return {"+": a + b, "-": a - b, "*": a * b}[op]


# ---- the families: rng -> a Problem, or None if its numbers do not work out ----------------------


def events(rng, lengths=(1, 2, 3, 4), shares=(1, 2, 3, 5)):
    """A chain of events: "Ann has 5 pens. Ann buys 7. That doubles. …"

    Long chains leave the range of numbers more often, so they are tried more often.
    """
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    total = rng.randint(2, 20)
    text, equations = [f"{name} has {total} {thing}."], []
    for _ in range(rng.choices(lengths, shares)[0]):
        bought, lost, found, sold = (rng.randint(2, 12) for _ in range(4))
        op, b, sentence = rng.choice(
            (
                ("+", bought, f"{name} buys {bought}."),
                ("-", lost, f"{name} loses {lost}."),
                ("+", found, f"{name} finds {found} more."),
                ("-", sold, f"{name} sells {sold}."),
                ("*", 2, "That doubles."),
                ("*", 3, "That triples."),
                ("/", 2, "Half of them break."),
            )
        )
        equations.append((total, op, b))
        total = calculate(total, op, b)
        text.append(sentence)
    return make_problem(" ".join(text) + f" How many {thing} has {name} now?", equations)


def longer_events(rng):
    return events(rng, lengths=(5, 6), shares=(1, 1))


def comparison(rng):
    """A chain of comparisons: "Ann has 5 pens. Bob has twice the pens of Ann. …", or reversed."""
    n, thing = rng.choices((1, 2, 3), (1, 2, 5))[0], rng.choice(THINGS)
    names = rng.sample(NAMES, n + 1)
    values = [rng.randint(2, 15)]
    text, equations = [f"{names[0]} has {values[0]} {thing}."], []
    for other, name in zip(names, names[1:]):
        more, fewer = (rng.randint(2, 12) for _ in range(2))
        op, b, words = rng.choice(
            (
                ("+", more, f"{more} more {thing} than"),
                ("-", fewer, f"{fewer} fewer {thing} than"),
                ("*", 2, f"twice the {thing} of"),
                ("*", 3, f"thrice the {thing} of"),
                ("/", 2, f"half the {thing} of"),
            )
        )
        equations.append((values[-1], op, b))
        values.append(calculate(*equations[-1]))
        text.append(f"{name} has {words} {other}.")
    if rng.random() < 0.5:
        text.reverse()

    if n > 1 and rng.random() < 0.4:  # the last two together: one step more
        equations.append((values[-2], "+", values[-1]))
        question = f"How many {thing} have {names[-2]} and {names[-1]} together?"
    else:
        question = f"How many {thing} has {names[-1]}?"
    return make_problem(" ".join([*text, question]), equations)


def groups(rng):
    """Two products, in either order: "Ann has 2 boxes of 3 pens and 4 bags of 5 pens. …" """
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c, d = (rng.randint(2, 7) for _ in range(4))
    first, second = (a, "*", b), (c, "*", d)
    equations = [first, second] if rng.random() < 0.5 else [second, first]
    text = f"{name} has {a} boxes of {b} {thing} and {c} bags of {d} {thing}."
    equations.append((calculate(*equations[0]), "+", calculate(*equations[1])))
    if rng.random() < 0.5:
        lost = rng.randint(2, 12)
        text += f" {name} loses {lost}."
        equations.append((a * b + c * d, "-", lost))
    return make_problem(text + f" How many {thing} has {name} now?", equations)


def shopping(rng):
    """Steps in any valid order: "Ann has 30 coins and buys 2 pens at 3 coins each …" """
    name, (x, y) = rng.choice(NAMES), rng.sample(THINGS, 2)
    money = rng.randint(5, LARGEST)
    a, p, b, q = (rng.randint(2, 6) for _ in range(4))
    text = f"{name} has {money} coins and buys {a} {x} at {p} coins each"
    if rng.random() < 0.4:
        equations = [(a, "*", p), (money, "-", a * p)]
        return make_problem(text + ". How many coins are left?", equations)

    text += f" and {b} {y} at {q} coins each"
    cost_x, cost_y = (a, "*", p), (b, "*", q)
    spent = (money, "-", a * p + b * q)
    equations = rng.choice(
        (
            [cost_x, cost_y, (a * p, "+", b * q), spent],
            [cost_y, cost_x, (b * q, "+", a * p), spent],
            [cost_x, (money, "-", a * p), cost_y, (money - a * p, "-", b * q)],
            [cost_y, (money, "-", b * q), cost_x, (money - b * q, "-", a * p)],
        )
    )
    return make_problem(text + ". How many coins are left?", equations)
