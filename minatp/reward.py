"""Rewards and measures as pure functions of strings (method.md, Stage 2). Numbers are compared as exact numbers."""
import ast
import re
from fractions import Fraction

LONGEST = 1000  # digits of a number; Python converts no more than 4,300 at once
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
SIGNED = re.compile(rf"(?<![\d.)])(?:(?<![\d.)] )-)?(?:{NUMBER.pattern})")  # a minus after a number or a bracket is an operator


def number(text):
    """The exact value of "19", "-3", "1,000", "2.50", "$7" or "40%" (the sign alone dropped); None where it is not a number."""
    text = text.strip().removeprefix("$").removesuffix("%").replace(",", "")
    return Fraction(text) if len(text) <= LONGEST and re.fullmatch(r"-?(\d+(\.\d+)?|\.\d+)", text) else None


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
    """R_acc: 1.0 where the number after "### " equals gold's; answers that are no numbers are compared as text."""
    return float(same(answer(text), gold))


def form(text, ended):
    """R_fmt: 1.0 for "### " with a number, then eos (`ended`)."""
    return float(ended and number(answer(text) or "") is not None)


def result(step):
    """The number after a step's last "=", or None."""
    left, equals, right = step.rpartition("=")
    found = SIGNED.search(right) if equals else None
    return number(found[0]) if found else None


def size(step):
    """`result` as a float; None where there is none or it is beyond what a float holds."""
    r = result(step)
    return float(r) if r is not None and abs(r) < 10**300 else None


def operands(step):
    """The numbers left of a step's last "="."""
    left, equals, _ = step.rpartition("=")
    return [number(m) for m in SIGNED.findall(left)] if equals else []


def links(steps, final):
    """Where the result of each step (a string) is used: the indices of the later steps that have it as an operand, and len(steps)
    where it equals the final answer (a string or None)."""
    end, taken = number(final) if final is not None else None, [operands(s) for s in steps]
    return [[] if (r := result(s)) is None else
            [j for j in range(i + 1, len(steps)) if r in taken[j]] + [len(steps)] * (r == end) for i, s in enumerate(steps)]


def coherent(steps, final):
    """For each step, whether its result is an operand of a later step or equals the final answer."""
    return [bool(used) for used in links(steps, final)]


def coherence(steps, final, strict=False):
    """R_coh: coherent steps / steps; 0.0 where there are none. strict: a step must be true as well, and not one told before."""
    good = coherent(steps, final)
    if strict:
        good = [g and true(s) and s not in steps[:i] for i, (g, s) in enumerate(zip(good, steps))]
    return sum(good) / len(steps) if steps else 0.0


def true(step):
    """Whether what stands left of a step's last "=" has the value on its right, exactly. False where it is not arithmetic."""
    left = step.strip().removeprefix("<<").rpartition("=")[0].replace(",", "").replace("$", "")
    try:
        return result(step) is not None and value(ast.parse(left.strip(), mode="eval").body, left.strip()) == result(step)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


def value(node, text):
    """Exact value of an arithmetic expression. Raises ValueError on anything but numbers, + − * / and brackets."""
    operation = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__, ast.Mult: Fraction.__mul__, ast.Div: Fraction.__truediv__}
    if isinstance(node, ast.BinOp) and type(node.op) in operation:
        return operation[type(node.op)](value(node.left, text), value(node.right, text))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand, text)
    if isinstance(node, ast.Constant) and (found := number(ast.get_source_segment(text, node))) is not None:
        return found
    raise ValueError


def total(text, steps, ended, gold, w_acc=1.0, w_coh=0.1, w_fmt=0.5, strict=False):
    """R = (w_acc + w_coh·R_coh)·R_acc + w_fmt·R_fmt, and its parts as a dict. gold None: no answer is known, and
    R = w_coh·R_coh + w_fmt·R_fmt."""
    parts = {"acc": accuracy(text, gold) if gold is not None else 0.0, "coh": coherence(steps, answer(text), strict),
             "fmt": form(text, ended)}
    judged = w_coh * parts["coh"] if gold is None else (w_acc + w_coh * parts["coh"]) * parts["acc"]
    return judged + w_fmt * parts["fmt"], parts
