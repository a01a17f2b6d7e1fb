"""More word problems to learn from, in richer wording than the built-in task's, as JSON lines.

    python -m minatp.tools.stories 12000 > stories.jsonl
    python train.py --stage sft --data gsm8k/train.jsonl,stories.jsonl …

A few thousand problems with written steps, such as GSM8K's, are few for latents to learn arithmetic
from. These have larger numbers than the built-in task, money, rates, shares and percentages, in
1 to 7 steps (most in 1 to 4), and are meant for training, not for tests.

docs/results.md has runs that learned from the first 12,000 of seed 0, so a test holds these fixed.
Another wording, or one more random number, would change them all.
"""

import json
import random
from fractions import Fraction

from ..problems import MOST, Problem
from ..run.errors import UserError, run_command
from ..run.options import Parser

# fmt: off
NAMES = {
    "she": "Anna Bella Clara Diana Elena Fatima Grace Hannah Irene Julia Kira Lena Maria Nora Olga",
    "he": "Adam Boris Carlos David Erik Felix George Henry Ivan Jacob Karim Luis Marco Nathan Omar",
}
THINGS = ("apples marbles stickers pencils books coins cards shells stamps candles cookies flowers "
          "balloons oranges beads ribbons buttons toys muffins bottles").split()
PARTS = ((2, "half"), (3, "a third"), (4, "a quarter"), (5, "one fifth"))
# fmt: on
LARGEST = 5000  # no result of a step is larger


class Impossible(Exception):
    """The numbers of a story do not work out."""


class Story:
    """One problem in the making. {things} in a wording stands for its attribute `things`."""

    def __init__(self, rng):
        self.rng = rng
        self.sentences, self.steps, self.answer = [], [], None
        self.they, self.their = rng.choice((("she", "her"), ("he", "his")))
        self.name, self.friend = rng.sample(NAMES[self.they].split(), 2)
        self.things, self.extras = rng.sample(THINGS, 2)  # extras: other things

    def tell(self, *wordings, **words):
        """Add a sentence in one of these wordings. The last sentence is the question."""
        sentence = self.rng.choice(wordings).format(**vars(self), **words)
        self.sentences.append(sentence[0].upper() + sentence[1:])

    def step(self, a, op, b, *wordings, unit=1):
        """Tell a and b in one of the wordings, if any; then a op b is the next step -> its value.

        op: + - * / or %, b percent of a. Raises Impossible if the value is not positive, too large,
        or not a multiple of `unit`.
        """
        if wordings:
            self.tell(*wordings, a=as_text(a), b=as_text(b))
        a, b = Fraction(a), Fraction(b)
        if op == "%":
            op, b = "*", b / 100
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op]
        if not 0 < value <= LARGEST or value % unit:
            raise Impossible
        self.answer = as_text(value)
        self.steps.append(f"<<{as_text(a)}{op}{as_text(b)}={self.answer}>>")
        return value

    def dollars(self, a, op, b, *wordings):
        """A step whose value may have cents."""
        return self.step(a, op, b, *wordings, unit=Fraction(1, 100))


def as_text(number):
    """3, 0.5 or 12.75, as it is written."""
    return f"{float(number):g}"


# ---- the families: each tells a Story, with the random numbers of r ------------------------------
# fmt: off


def changes(s, r):
    """Things are added and taken away, one to three times, or shared out in the end."""
    if r.random() < 0.4:
        n = s.step(r.randint(2, 12), "*", r.randint(3, 25),
                   "{name} buys {a} boxes of {b} {things} each.",
                   "{name} has {a} bags with {b} {things} in each bag.",
                   "There are {a} shelves in {name}'s room, and each shelf holds {b} {things}.")
    else:
        n = r.randint(5, 120)
        s.tell("{name} has {n} {things}.", "{name} collected {n} {things} last summer.",
               "On Monday, {name} had {n} {things}.", n=n)

    for _ in range(r.choice((1, 1, 2, 2, 3))):
        change = r.choice(("gain", "loss", "loss", "part", "percent", "piles"))
        some = r.randint(2, 60)
        if change == "gain":
            n = s.step(n, "+", some,
                       "{friend} gives {name} {b} more.", "{they} finds another {b} {things}.",
                       "Then {they} gets {b} more {things} as a present.",
                       "{they} buys {b} more {things} at the market.")
        elif change == "loss":
            n = s.step(n, "-", some,
                       "{they} gives {b} of them to {their} neighbor.",
                       "{they} loses {b} of the {things}.",
                       "{b} of them turn out to be broken and {they} throws them away.",
                       "{they} sells {b} {things}.")
        elif change == "part":
            parts, s.part = r.choice(PARTS)
            gone = s.step(n, "/", parts, "{they} gives {part} of the {things} to {friend}.",
                          "{they} uses {part} of {their} {things}.")
            n = s.step(n, "-", gone)
        elif change == "percent":
            gone = s.step(n, "%", r.choice((10, 20, 25, 30, 40, 50)), "{they} sells {b}% of them.",
                          "{b}% of the {things} are damaged and have to be thrown away.")
            n = s.step(n, "-", gone)
        else:
            s.step(n, "/", r.randint(2, 8),
                   "{they} shares what {they} has equally among {b} friends.",
                   "{they} puts all of {their} {things} into {b} equal piles.")
            return s.tell("How many {things} are in each share?",
                          "How many {things} is that for each one?")
    s.tell("How many {things} does {name} have now?", "How many {things} are left?",
           "How many {things} does {they} have in the end?")


def comparison(s, r):
    """Two or three people, each compared with the one before; the last of them, or all together."""
    s.name, *others = r.sample(" ".join(NAMES.values()).split(), r.choice((2, 2, 3)))
    numbers = [r.randint(4, 80)]
    s.tell("{name} has {n} {things}.", "{name} collected {n} {things}.", n=numbers[0])
    for other in others:
        s.friend, s.name = s.name, other
        kind = r.choice(("more", "fewer", "twice", "times", "half"))
        some = r.randint(2, 30)
        if kind == "times":  # 30 times as many would be too many
            some = r.choice((3, 4, 5))
        op, b, *amounts = {
            "more": ("+", some, "{b} more {things} than {friend}", "{b} more than {friend}"),
            "fewer": ("-", some, "{b} fewer {things} than {friend}", "{b} less than {friend}"),
            "twice": ("*", 2, "twice as many {things} as {friend}", "double that of {friend}"),
            "times": ("*", some, "{b} times as many {things} as {friend}",
                      "{b} times the number of {friend}'s {things}"),
            "half": ("/", 2, "half as many {things} as {friend}", "half of what {friend} has"),
        }[kind]
        wordings = ["{name} has " + amount + "." for amount in amounts]
        numbers.append(s.step(numbers[-1], op, b, *wordings))

    if r.random() < 0.5:
        return s.tell("How many {things} does {name} have?")
    total = numbers[0]
    for n in numbers[1:]:
        total = s.step(total, "+", n)
    s.tell("How many {things} do they have together?", "How many {things} do they have altogether?",
           "What is the total number of {things} that they have?")


def price(r):
    """Dollars: a whole number, or sometimes half a dollar more."""
    whole, another, halves = r.randint(2, 30), r.randint(2, 30), r.randint(2, 40)
    return r.choice((whole, another, halves / 2))


def shopping(s, r):
    """Prices and amounts: the cost, with a discount, split among friends, or the change."""
    total = s.dollars(r.randint(2, 12), "*", price(r), "{name} buys {a} {things} for ${b} each.",
                      "At the store, {name} picks {a} {things} that cost ${b} each.",
                      "{name} needs {a} {things}, and each one costs ${b}.")
    if r.random() < 0.6:
        if r.random() < 0.6:
            cost = s.dollars(r.randint(2, 12), "*", price(r),
                             "{they} also buys {a} {extras} at ${b} each.",
                             "{they} adds {a} {extras}, which cost ${b} apiece.")
            total = s.dollars(total, "+", cost)
        else:
            total = s.dollars(total, "+", price(r), "{they} also buys a bag for ${b}.",
                              "Delivery costs another ${b}.")

    wanted = r.choice(("cost", "discount", "split", "change"))
    if wanted == "cost":
        s.tell("How much does {they} spend in total?", "How many dollars does {name} pay?")
    elif wanted == "discount":
        off = s.dollars(total, "%", r.choice((10, 20, 25, 50)), "{they} has a coupon for {b}% off.",
                        "The store gives {their} order a {b}% discount.")
        s.dollars(total, "-", off)
        s.tell("How much does {they} pay?", "What is the final price in dollars?")
    elif wanted == "split":
        s.dollars(total, "/", r.randint(2, 6),
                  "{they} splits the cost equally with friends, so that {b} people pay.")
        s.tell("How many dollars does each of them pay?", "How much is that for each person?")
    else:
        money = min(m for m in (20, 50, 100, 200, 500, LARGEST) if m > total)
        s.dollars(money, "-", total,
                  "{they} pays with ${a}.", "{they} came with ${a} in {their} pocket.")
        s.tell("How much change does {they} get?", "How many dollars are left?")


def wages(s, r):
    """Some days of work for an hourly wage: all of it, what is left, or what is saved."""
    rate, hours, days = r.randint(6, 40), r.randint(2, 10), r.randint(2, 7)
    s.tell("{name} earns ${rate} an hour.", "{name} is paid ${rate} per hour at {their} job.",
           "{name} makes ${rate} for each hour of babysitting.", rate=rate)
    s.tell("{they} works {hours} hours a day, {days} days a week.",
           "{they} worked {hours} hours on each of {days} days.", hours=hours, days=days)
    a, b, c = (hours, days, rate) if r.random() < 0.5 else (rate, hours, days)
    total = s.step(s.step(a, "*", b), "*", c)

    wanted = r.choice(("all", "left", "weeks", "saved"))
    if wanted == "all":
        s.tell("How much does {name} earn in {time}?", time="a week" if days == 7 else "that time")
    elif wanted == "left":
        s.step(total, "-", r.randint(10, 300), "{they} spends ${b} of it on food.",
               "{they} has to pay ${b} for the bus and lunch.")
        s.tell("How much money is left?", "How many dollars does {they} have left?")
    elif wanted == "weeks":
        s.step(total, "*", r.randint(2, 8), "{they} does so for {b} weeks.")
        s.tell("How much does {name} earn in all those weeks?", "What does {they} earn altogether?")
    else:
        s.dollars(total, "%", r.choice((10, 20, 25, 30, 40, 50)),
                  "{they} saves {b}% of what {they} earns.")
        s.tell("How much does {they} save?", "How many dollars does {name} save?")


def rates(s, r):
    """So many a day: how many in all, how many are left, or how long it takes."""
    rate, days = r.randint(3, 60), r.randint(2, 14)
    s.verb, s.unit, goal = r.choice((
        ("reads", "pages", "The book has {a} pages."),
        ("types", "pages", "The report has {a} pages."),
        ("runs", "miles", "{they} wants to run {a} miles in all."),
        ("plants", "trees", "The garden has room for {a} trees."),
        ("paints", "chairs", "There are {a} chairs to paint."),
        ("drives", "miles", "The whole trip is {a} miles."),
    ))
    wanted = r.choice(("all", "left", "days left", "days"))
    if wanted == "days":
        s.tell(goal, a=rate * days)
        s.step(rate * days, "/", rate,
               "{name} {verb} {b} {unit} a day.", "Each day {name} {verb} {b} {unit}.")
        if days % 7 == 0 and r.random() < 0.5:
            s.step(days, "/", 7)
            return s.tell("How many weeks does that take?")
        return s.tell("How many days does that take?", "How many days does {name} need?")

    done = s.step(rate, "*", days, "{name} {verb} {a} {unit} a day for {b} days.",
                  "For {b} days, {name} {verb} {a} {unit} every day.")
    if wanted == "all":
        then = s.step(r.randint(3, 60), "*", r.randint(2, 10),
                      "For the next {b} days it is {a} {unit} a day.",
                      "Then {they} {verb} {a} {unit} a day for {b} more days.")
        s.step(done, "+", then)
        return s.tell("How many {unit} is that in total?", "How many {unit} are that altogether?")
    left = s.step(done + r.randint(5, 200), "-", done, goal)
    if wanted == "left":
        return s.tell("How many {unit} are left?", "How many {unit} remain?")
    s.step(left, "/", r.choice([d for d in range(2, 30) if left % d == 0] or [1]),
           "From now on it is to be {b} {unit} a day.")
    s.tell("How many more days does {name} need?", "How many days will the rest take?")


def making(s, r):
    """Things are made, packed and sold."""
    n = s.step(r.randint(2, 15), "*", r.choice((6, 8, 10, 12, 15, 20, 24)),
               "A bakery bakes {a} trays of {b} {things}.",
               "{name} makes {a} batches of {things}, with {b} in each batch.",
               "A workshop produces {b} {things} an hour and works for {a} hours.")
    s.rest = s.others = "they"
    if r.random() < 0.5:
        n = s.step(n, "-", r.randint(2, 40),
                   "{b} of them are kept for the family.", "Of these, {b} are given away.")
        s.rest, s.others = "the rest", "the others"

    each = r.choice((1, 2, 3, 4, 5, 6, 0.5, 1.5, 2.5))
    if r.random() < 0.5:
        per_box = r.choice((2, 3, 4, 5, 6, 8, 10))
        n = s.step(n, "/", per_box, "{rest} are packed into boxes of {b}.")
        if r.random() < 0.4:
            return s.tell("How many boxes are there?", "How many boxes are needed?")
        total = s.dollars(n, "*", each * per_box, "Each box is sold for ${b}.", "A box costs ${b}.")
    else:
        total = s.dollars(n, "*", each, "{others} are sold for ${b} each.")
    if r.random() < 0.4:
        s.dollars(total, "-", r.randint(5, 60),
                  "What went into them cost ${b}.", "The ingredients and the stall cost ${b}.")
        return s.tell("What is the profit in dollars?", "How much profit is made?")
    s.tell("How much money do they bring?", "How many dollars is that in total?")


def shares(s, r):
    """People or animals, of whom some are young."""
    n = r.choice(range(20, 401, 10))
    s.who, s.place = r.choice((("students", "school trip"), ("people", "concert"),
                               ("animals", "farm"), ("workers", "factory"),
                               ("children", "summer camp")))
    s.tell("There are {n} {who} at a {place}.", "A {place} has {n} {who}.", n=n)
    share = r.choice(("percent", "part", "number"))
    if share == "percent":
        young = s.step(n, "%", r.choice((10, 20, 25, 30, 40, 60, 75)),
                       "{b}% of them are young.", "Of these, {b}% are young.")
    elif share == "part":
        parts, s.part = r.choice(PARTS)
        young = s.step(n, "/", parts, "{part} of them are young.", "{part} of the {who} are young.")
    else:
        young = r.randint(5, n - 5)
        s.tell("{young} of them are young.", young=young)

    if r.random() < 0.3 and s.steps:
        return s.tell("How many {who} are young?")
    rest = s.step(n, "-", young)
    if r.random() < 0.4:
        return s.tell("How many {who} are not young?", "How many of the {who} are not young?")
    if r.random() < 0.5:
        s.step(rest, "/", 2, "Half of the rest come from far away.",
               "Of the others, half live nearby and half far away.")
        return s.tell("How many of those who are not young come from far away?")
    s.step(rest, "*", r.randint(2, 15),
           "Each one who is not young pays ${b}, and the young ones pay nothing.")
    s.tell("How much is paid in total?", "How many dollars is that altogether?")


def ages(s, r):
    """Two ages: one of them in some years, their sum or their average."""
    age = r.randint(5, 30)
    s.tell("{name} is {age} years old.", age=age)
    op, wording = r.choice((("+", "{friend} is {b} years older than {name}."),
                            ("-", "{friend} is {b} years younger than {name}."),
                            ("*", "{friend} is {times} as old as {name}.")))
    b = r.randint(2, 12)
    if op == "*":
        b, s.times = r.choice(((2, "twice"), (3, "three times")))
    other = s.step(age, op, b, wording)

    years = r.randint(2, 15)
    wanted = r.choice(("later", "sum", "average"))
    if wanted == "later":
        s.step(other, "+", years)
        return s.tell("How old will {friend} be in {years} years?", years=years)
    total = s.step(age, "+", other)
    if wanted == "sum":
        return s.tell("What is the sum of their ages?", "How old are they together?")
    s.step(total, "/", 2)
    s.tell("What is the average of their ages?")


def units(s, r):
    """Dozens, hours and minutes, weeks and days, or feet and inches."""
    large = r.choice(("hours", "dozen", "weeks", "feet"))
    n, some = r.randint(2, 9), r.randint(2, 12)
    if large == "dozen":
        n = s.step(n, "*", 12, "{name} buys {a} dozen {things}.",
                   "There are {a} dozen {things} in the kitchen.")
        used = s.step(some, "*", r.randint(2, 5), "{they} uses {a} of them each day for {b} days.")
        s.step(n, "-", used)
        return s.tell("How many {things} are left?", "How many {things} remain?")

    size, s.unit, amount, less, question = {
        "hours": (60, "minutes", "{name} practices the piano for {n} hours and {some} minutes.",
                  "The day before, it was {b} minutes less.",
                  "How many minutes was it the day before?"),
        "weeks": (7, "days", "{name} is on a trip for {n} weeks and {some} days.",
                  "{they} stays at home for the first {b} days.",
                  "How many days is {they} away from home?"),
        "feet": (12, "inches", "{name} has a rope of {n} feet and {some} inches.",
                 "{they} cuts off {b} inches.", "How many inches are left?"),
    }[large]
    s.tell(amount, n=n, some=some)
    n = s.step(s.step(n, "*", size), "+", some)
    if r.random() < 0.4:
        return s.tell("How many {unit} is that?", "How many {unit} is that in total?")
    s.step(n, "-", r.randint(2, 40), less)
    s.tell(question)


FAMILIES = {changes: 4, comparison: 3, shopping: 4, wages: 2, rates: 3, making: 3, shares: 2,
            ages: 1, units: 1}  # and the relative frequency of each
# fmt: on


def generate(n, seed):
    """n different Problems, the same for the same seed."""
    rng = random.Random(f"stories/{seed}")
    problems = {}  # by question
    while len(problems) < n:
        story = Story(rng)
        [family] = rng.choices(list(FAMILIES), FAMILIES.values())
        try:
            family(story, rng)
        except Impossible:
            continue
        question = " ".join(story.sentences)
        problems.setdefault(question, Problem(question, story.steps, story.answer))
    return list(problems.values())


def main(argv=None):
    """Print problems, one JSON object a line."""
    parser = Parser(__doc__, "minatp.tools.stories")
    parser.add_argument("n", type=int, help=f"how many problems, at most {MOST:,}")
    parser.add_argument("seed", type=int, nargs="?", default=0, help="of the problems [0]")
    args = parser.parse_args(argv)
    if not 1 <= args.n <= MOST:
        raise UserError(f"command line: {args.n:,} problems; ask for 1 to {MOST:,}")
    for p in generate(args.n, args.seed):
        print(json.dumps({"question": p.question, "steps": p.steps, "answer": p.answer}))


if __name__ == "__main__":
    run_command(main)
