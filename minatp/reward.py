"""Rewards and measures as functions of strings (docs/method.md, Stage 2).

Numbers are compared exactly, as fractions.

accuracy       is the number after "### " right?
form           is the answer well-formed and ended?
coherence      is the result of each step used by a later step, or the answer?
chain_reward   all of them, for one chain

In all of them `final` is the answer that the chain itself gave, and `gold` the right one.
"""

import ast
import re
from fractions import Fraction

LONGEST = 1000  # digits of a number; Python converts no more than 4,300 at once
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
# A minus after a number or a bracket is an operator, not a sign: "-3", "(-3)" and "2*-3" hold −3,
# but "5-3", "5 - 3" and "(1+1)-3" hold 3
SIGNED = re.compile(rf"(?<![\d.)])(?:(?<![\d.)] )-)?(?:{NUMBER.pattern})")


# ---- numbers -------------------------------------------------------------------------------------


def number(text):
    """The exact value of "19", "-3", "1,000", "2.50", "$7" or "40%"; None if it is not a number.

    Of "$7" and "40%" the symbol is dropped, nothing else.
    """
    text = text.strip().removeprefix("$").removesuffix("%").replace(",", "")
    if len(text) > LONGEST or not re.fullmatch(r"-?(\d+(\.\d+)?|\.\d+)", text):
        return None
    return Fraction(text)


def answer(text):
    """What stands after the first "### ", a string; None if there is none."""
    _, mark, rest = text.partition("### ")
    return rest.strip() if mark else None


def same(a, b):
    """Whether two answers (strings or None) are equal, as numbers if both are numbers."""
    if a is None or b is None:
        return False
    x, y = number(a), number(b)
    if x is None or y is None:
        return a.strip() == b.strip()
    return x == y


# ---- the answer ----------------------------------------------------------------------------------


def accuracy(text, gold):
    """R_acc: 1.0 if the number after "### " equals gold's.

    Answers that are not numbers are compared as text.
    """
    return float(same(answer(text), gold))


def form(text, ended):
    """R_fmt: 1.0 for "### " with a number, then eos (`ended`)."""
    return float(ended and number(answer(text) or "") is not None)


# ---- the steps -----------------------------------------------------------------------------------


def result(step):
    """The number after a step's last "=", or None."""
    _, equals, right = step.rpartition("=")
    match = SIGNED.search(right) if equals else None
    return number(match[0]) if match else None


def result_as_float(step):
    """`result` as a float; None if there is none or it is beyond what a float holds."""
    r = result(step)
    return float(r) if r is not None and abs(r) < 10**300 else None


def operands(step):
    """The numbers left of a step's last "="."""
    left, equals, _ = step.rpartition("=")
    return [number(match) for match in SIGNED.findall(left)] if equals else []


def links(steps, final):
    """Where the result of each step (a string) is used, a list of indices for each.

    They are the later steps that have it as an operand, and len(steps) if it equals the final
    answer (a string or None).
    """
    final_number = None if final is None else number(final)
    operands_of = [operands(step) for step in steps]
    used_by = []
    for i, step in enumerate(steps):
        r, users = result(step), []
        if r is not None:
            users = [j for j in range(i + 1, len(steps)) if r in operands_of[j]]
            if r == final_number:
                users.append(len(steps))
        used_by.append(users)
    return used_by


def coherent(steps, final):
    """For each step, whether its result is an operand of a later step or the final answer."""
    return [bool(users) for users in links(steps, final)]


def coherence(steps, final, strict=False):
    """R_coh: coherent steps / steps; 0.0 without steps.

    strict: a step must also be true, and not a repetition.
    """
    good = coherent(steps, final)
    if strict:
        for i, step in enumerate(steps):
            good[i] = good[i] and true(step) and step not in steps[:i]
    return sum(good) / len(steps) if steps else 0.0


def true(step):
    """Whether the left of a step's last "=" has exactly the value on its right.

    False if it is not arithmetic.
    """
    left = step.strip().removeprefix("<<").rpartition("=")[0]
    left = left.replace(",", "").replace("$", "").strip()
    try:
        r = result(step)
        return r is not None and value(ast.parse(left, mode="eval").body, left) == r
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


def value(node, text):
    """The exact value of an arithmetic expression, the syntax tree of `text`.

    Raises ValueError on anything but numbers, + − * / and brackets.
    """
    operations = {
        ast.Add: Fraction.__add__,
        ast.Sub: Fraction.__sub__,
        ast.Mult: Fraction.__mul__,
        ast.Div: Fraction.__truediv__,
    }
    if isinstance(node, ast.BinOp) and type(node.op) in operations:
        return operations[type(node.op)](value(node.left, text), value(node.right, text))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand, text)
    if isinstance(node, ast.Constant):
        n = number(ast.get_source_segment(text, node))
        if n is not None:
            return n
    raise ValueError


# ---- one chain -----------------------------------------------------------------------------------


def chain_reward(cfg, chain, gold):
    """The reward of a decoder.Chain -> (R, its terms {"acc", "coh", "fmt"}).

    R = (w_acc + w_coh·R_coh)·R_acc + w_fmt·R_fmt. With cfg.no_answers the reward sees no answer,
    there is no "acc", and R = w_coh·R_coh + w_fmt·R_fmt.
    """
    strict = cfg.coherence == "strict"
    terms = {
        "acc": accuracy(chain.text, gold),
        "coh": coherence(chain.steps, answer(chain.text), strict),
        "fmt": form(chain.text, chain.ended),
    }
    if cfg.no_answers:
        del terms["acc"]
        reasoning = cfg.w_coh * terms["coh"]
    else:
        reasoning = (cfg.w_acc + cfg.w_coh * terms["coh"]) * terms["acc"]
    return reasoning + cfg.w_fmt * terms["fmt"], terms
