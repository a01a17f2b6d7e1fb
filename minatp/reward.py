"""Rewards and measures: functions of strings, and of a Chain (docs/method.md, Stage 2).

Numbers are exact, as fractions.

Evaluation measures accuracy and coherence, too, so leave these as they are: to try another reward,
add a function and use it in chain_reward.

accuracy       is the number after "### " right?
form           is the answer well-formed and ended?
coherence      is the result of each step used by a later step, or the answer?
chain_reward   all of them, for one chain
needs_thoughts does φ have to read the chain for that? (chains_to_read: of many)

In all of them `final` is the answer that the chain itself gave, and `gold` the right one.
"""

import ast
import operator
import re
from decimal import Decimal
from fractions import Fraction

from .problems import normal_form

TOLERANCE = Fraction(1, 1000)  # relative, of a gold that is not an integer
# Characters of a number, and of a calculation. (Python converts no more than 4,300 digits at once)
LONGEST = 1000

# All that may be one number: "1,5" is found as a whole, and then is not well-formed
NUMERAL = r"\.?\d(?:[\d.,]*\d)?(?:[eE][+-]?\d+|%)?"
# A comma stands between groups of three digits; an exponent has three digits at most
WELL_FORMED = re.compile(r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}|%)?")

# An answer: its sign on either side of a currency, its number, and words or a unit. A second number
# or an operator may not follow, so that neither a list of guesses nor a calculation is an answer;
# nor may a power or a fraction, as in 10² and 1½
NOT_CALCULATED = r"(?!\s*[-+*/#]|[%.,]?\s*[¹²³⁰-⁹¼-¾⅐-⅞])"
ANSWER = re.compile(rf"([+-]?(?:[$€£] ?)?|[$€£] ?[+-])({NUMERAL}){NOT_CALCULATED}([^\d=<>]*)")

# A number in a step, or a fraction of two. A minus after a number or a bracket is an operator, not
# a sign: "-3", "(-3)" and "2*-3" hold −3, but "5-3", "5 - 3" and "(1+1)-3" hold 3
IN_STEP = re.compile(
    r"(?<![\d.)%])[$€£]?((?:(?<![\d.)%] )-)?)[$€£]?"  # its sign
    rf"({NUMERAL})(?:\s*/\s*({NUMERAL}))?"
)
SYMBOLS = str.maketrans("−×÷", "-*/")


# ---- numbers -------------------------------------------------------------------------------------


def exact(numeral):
    """The exact value of "19", "1,000", "2.50", "2e-06" or "40%" (0.4); None if it is no number."""
    if len(numeral) > LONGEST or not WELL_FORMED.fullmatch(numeral):
        return None
    return Fraction(numeral.replace(",", "").replace("%", "e-2"))


def number(text, alone=False):
    """The number that an answer (a string) begins with, exactly; None if there is none.

    "$7", "-$18", "29." and "72, altogether" are numbers, and "40%" is 40: a unit is dropped.
    alone: no words may follow.
    """
    match = ANSWER.fullmatch(text.strip().translate(SYMBOLS))
    if not match or (alone and match[3].strip(" .%$€£")):
        return None
    value = exact(match[2].removesuffix("%"))
    return -value if value is not None and "-" in match[1] else value


def answer(text):
    """What stands after the first "### ", a string; None if there is none."""
    _, mark, rest = text.partition("### ")
    return rest.strip() if mark else None


def parsed(text):
    """What an answer (a string) says: its number, or else its text in normal form."""
    value = number(text)
    return normal_form(text) if value is None else value


def same(a, b):
    """Whether two answers (strings or None) say the same. A missing one says nothing."""
    return a is not None and b is not None and parsed(a) == parsed(b)


# ---- the answer ----------------------------------------------------------------------------------


def accuracy(text, gold):
    """R_acc: 1.0 if the number after "### " is gold's.

    It has to equal an integer, and be within TOLERANCE of any other number. A gold that is not a
    number alone is compared as text, in normal form.
    """
    given = answer(text)
    if given is None:
        return 0.0

    right, said = number(gold, alone=True), number(given)
    if right is None:
        return float(normal_form(given) == normal_form(gold))
    if said is None:
        return 0.0
    error = abs(said - right)
    return float(error == 0 or (right.denominator > 1 and error <= TOLERANCE * abs(right)))


def form(text, ended):
    """R_fmt: 1.0 for "### " with a number, then eos (`ended`)."""
    return float(ended and number(answer(text) or "") is not None)


# ---- the steps -----------------------------------------------------------------------------------


def parts(match):
    """A match of IN_STEP -> [its value, and of a fraction such as 3/4 also 3 and 4], some None."""
    sign, top, bottom = match.groups()
    a, b = exact(top), exact(bottom or "1")
    if a is not None and sign:
        a = -a
    value = a / b if a is not None and b else None
    return [value, a, b] if bottom else [value]


def result(step):
    """The number after a step's last "=", or None. That of "3/4" is 0.75, and of "30%" 0.3."""
    _, equals, right = step.translate(SYMBOLS).rpartition("=")
    match = IN_STEP.search(right) if equals else None
    return parts(match)[0] if match else None


def result_as_float(step):
    """`result` as a float; None if there is none or it is beyond what a float holds."""
    r = result(step)
    return float(r) if r is not None and abs(r) < 10**300 else None


def operands(step):
    """The numbers left of a step's last "=", some None.

    "3/4" is a number like 3 and 4; "6/3" is a division to be carried out: 2 is no operand of it.
    """
    numbers = []
    left = step.translate(SYMBOLS).rpartition("=")[0]
    for match in IN_STEP.finditer(left):
        value, *fraction = parts(match)
        is_division = fraction and value is not None and value.denominator == 1
        numbers += fraction if is_division else [value, *fraction]
    return numbers


def links(steps, final):
    """Where the result of each step (a string) is used, a list of indices for each.

    They are the later steps that have it as an operand, and len(steps) if it equals the final
    answer (a string or None).
    """
    # The answer "40%" is the number 40, and also what a step writes so
    endings = [number(final or "")]
    if match := IN_STEP.fullmatch(final or ""):
        endings.append(parts(match)[0])

    operands_of = [operands(step) for step in steps]
    used_by = []
    for i, step in enumerate(steps):
        r, users = result(step), []
        if r is not None:
            users = [j for j in range(i + 1, len(steps)) if r in operands_of[j]]
            if r in endings:
                users.append(len(steps))
        used_by.append(users)
    return used_by


def coherence(steps, final, strict=False):
    """R_coh: steps whose result is used / steps; 0.0 without steps.

    strict: a step must also be true, and not a repetition.
    """
    good = [bool(users) for users in links(steps, final)]
    if strict:
        for i, step in enumerate(steps):
            good[i] = good[i] and true(step) and step not in steps[:i]
    return sum(good) / len(steps) if steps else 0.0


def true(step):
    """Whether the left of a step's last "=" has the value on its right.

    A value that no decimal number has, such as 10/3, may be rounded: to 3.3 or 3.33, not to 3.
    False if it is not arithmetic.
    """
    left, _, right = step.translate(SYMBOLS).rpartition("=")
    r = result(step)
    if r is None or len(left) > LONGEST:
        return False

    # Every number becomes a bracket of integers, 0.2 for example (1/5), so that it stays exact
    left = re.sub(r"[$€£]", "", left).strip().removeprefix("<<")
    left = re.sub(NUMERAL, lambda match: f"({exact(match[0])})", left).strip()
    try:
        v = value_of(ast.parse(left, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return v == r or (not is_decimal(v) and is_rounded(v, right))


def is_decimal(value):
    """Whether a decimal number can equal a fraction: its denominator divides a power of 10."""
    n = value.denominator
    # Its prime factors are 2 and 5 alone, each at most bit_length times
    return pow(10, n.bit_length(), n) == 0


def is_rounded(value, text):
    """Whether the first number in a text is `value`, rounded to the decimals that it shows."""
    match = IN_STEP.search(text)
    numeral = match[2].replace(",", "").replace("%", "e-2")
    decimals = -Decimal(numeral).as_tuple().exponent
    return not match[3] and decimals > 0 and round(value, decimals) == parts(match)[0]


def value_of(node):
    """The exact value of an arithmetic expression of integers, a syntax tree.

    Raises ValueError on anything but numbers, + − * / // and brackets.
    """
    operations = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.UAdd: operator.pos,
        ast.USub: operator.neg,
    }
    operation = operations.get(type(getattr(node, "op", None)))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if operation and isinstance(node, ast.UnaryOp):
        return operation(value_of(node.operand))
    if operation and isinstance(node, ast.BinOp):
        # floordiv of fractions is an int
        return Fraction(operation(value_of(node.left), value_of(node.right)))
    raise ValueError


# ---- one chain -----------------------------------------------------------------------------------


def needs_thoughts(cfg, text, gold):
    """Whether φ has to read a chain that wrote `text` before it is rewarded.

    In training it reads no others: a wrong answer earns nothing for coherence. (With w_coh = 0 the
    right ones are read for the log alone.)
    """
    return cfg.no_answers or accuracy(text, gold) > 0


def chains_to_read(cfg, chains, answers):
    """The indices of the Chains that φ has to read before they are rewarded. answers: the right
    one of each.
    """
    texts = [chain.text for chain in chains]
    return [b for b, each in enumerate(zip(texts, answers)) if needs_thoughts(cfg, *each)]


def chain_reward(cfg, chain, gold):
    """The reward of a Chain (decoder.py) -> (R, its terms, which are logged under their names).

    R = (w_acc + w_coh·R_coh)·R_acc + w_fmt·R_fmt. With cfg.no_answers the reward sees no answer,
    and R = w_coh·R_coh + w_fmt·R_fmt. Every chain has the same terms.
    """
    terms = {} if cfg.no_answers else {"acc": accuracy(chain.text, gold)}

    # Coherence, which is 0 where the answer is wrong: R_acc is 0 or 1
    terms["coh"] = 0.0
    if needs_thoughts(cfg, chain.text, gold):
        terms["coh"] = coherence(chain.steps, answer(chain.text), cfg.coherence == "strict")

    terms["fmt"] = form(chain.text, chain.ended)
    weight = {"acc": cfg.w_acc, "coh": cfg.w_coh, "fmt": cfg.w_fmt}
    return sum(weight[name] * value for name, value in terms.items()), terms
