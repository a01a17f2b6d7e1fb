"""Rewards and measures as pure functions of strings (method.md, Stage 2). Numbers are compared as exact numbers."""
import re
from fractions import Fraction

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
SIGNED = re.compile(rf"(?<![\d.)])-?(?:{NUMBER.pattern})")  # a minus after a number or a bracket is an operator
ANSWER = re.compile(rf"### \s*\$?(-?(?:{NUMBER.pattern}))%?\s*$")


def number(text):
    """The exact value of "19", "-3", "1,000", "2.50", "$7" or "40%" (the sign alone dropped); None where it is not a number."""
    text = text.strip().removeprefix("$").removesuffix("%").replace(",", "")
    return Fraction(text) if re.fullmatch(r"-?(\d+(\.\d+)?|\.\d+)", text) else None


def answer(text):
    """What stands after the first "### ", a string; None where there is none."""
    _, mark, rest = text.partition("### ")
    return rest.strip() if mark else None


def same(a, b):
    """Whether two answers are equal, as numbers where both are numbers."""
    if a is None or b is None:
        return False
    x, y = number(a), number(b)
    return x == y if x is not None and y is not None else a.strip() == b.strip()


def accuracy(text, gold):
    """R_acc: 1.0 where the number after "### " equals gold's."""
    return float(same(answer(text), gold))


def form(text, ended):
    """R_fmt: 1.0 for "### " with a number, then eos (`ended`)."""
    return float(ended and ANSWER.search(text) is not None)


def result(step):
    """The number after a step's last "=", or None."""
    left, equals, right = step.rpartition("=")
    found = SIGNED.search(right) if equals else None
    return number(found[0]) if found else None


def operands(step):
    """The numbers left of a step's last "="."""
    left, equals, _ = step.rpartition("=")
    return [number(m) for m in SIGNED.findall(left)] if equals else []


def coherent(steps, final):
    """For each step (a string), whether its result is an operand of a later step or equals the final answer (a string or None)."""
    end = number(final) if final is not None else None
    return [(r := result(s)) is not None and (r == end or any(r in operands(later) for later in steps[i + 1:]))
            for i, s in enumerate(steps)]


def coherence(steps, final):
    """R_coh: coherent steps / steps; 0.0 where there are none."""
    return sum(coherent(steps, final)) / len(steps) if steps else 0.0
