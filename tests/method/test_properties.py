"""What must hold for every text: the parsers of answers, of coherence and of problem files, and the tokenizer.

1,000 examples each, always the same; 10,000 and new ones with MINATP_LONG=1.
"""
import json
import os
import tempfile
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from minatp import data, problems, reward
from minatp.config import UserError
from minatp.latent import END, LATENT, START

LONG = os.environ.get("MINATP_LONG") == "1"
thorough = settings(max_examples=10_000 if LONG else 1000, derandomize=not LONG, deadline=None, database=None)

words = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
near = st.text("0123456789-+*/=.,$%#<>() \n", max_size=16)  # what looks like an answer or a step
integers, small = st.integers(-10**6, 10**6), st.integers(0, 12)


# ---- answers ------------------------------------------------------------------------------------------------------------

def spellings(n, places):
    """A number as people write it."""
    plain = f"{n / 10**places:.{places}f}"
    longer = plain + ("0" if places else ".0")
    return [plain, f"{n / 10**places:,.{places}f}", longer, f" {plain} ", f"{plain}%"] + [f"${plain}"] * (n >= 0)


@thorough
@given(integers, st.integers(0, 4), words)
def test_an_answer_is_read_in_every_spelling_and_is_no_other_number(n, places, before):
    assume("### " not in before)
    value = Fraction(n, 10**places)
    for text in spellings(n, places):
        written = before + "### " + text
        assert reward.number(text) == value and reward.answer(written) == text.strip()
        assert reward.accuracy(written, spellings(n, places)[0]) == 1.0 == reward.form("### " + text, True)
        assert reward.accuracy(written, str(n + 1)) == float(value == n + 1) and reward.form(written, False) == 0.0


@thorough
@given(st.one_of(words, near), st.one_of(words, near))
def test_any_text_is_judged(a, b):
    assert reward.number(a) is None or type(reward.number(a)) is Fraction
    assert reward.same(a, b) == reward.same(b, a) and reward.same(a, a) and not reward.same(a, None)
    assert (reward.answer(a) is None) == ("### " not in a)
    assert reward.accuracy(a, b) in (0.0, 1.0) and reward.form(a, True) in (0.0, 1.0)
    if "### " not in a:
        assert reward.accuracy(a, b) == reward.form(a, True) == 0.0


# ---- coherence ----------------------------------------------------------------------------------------------------------

@thorough
@given(st.lists(st.tuples(small, st.sampled_from("+-*/"), small, small), max_size=4), small)
def test_coherence_is_what_its_definition_says(steps, final):
    texts = [f"<<{a}{op}{b}={c}>>" for a, op, b, c in steps]
    want = [c == final or any(c in (x, y) for x, _, y, _ in steps[i + 1:]) for i, (_, _, _, c) in enumerate(steps)]
    assert reward.coherent(texts, str(final)) == want
    assert reward.coherence(texts, str(final)) == (sum(want) / len(steps) if steps else 0.0)


@thorough
@given(st.lists(st.one_of(words, near), max_size=4), st.one_of(st.none(), near))
def test_any_steps_are_judged(steps, final):
    paper, strict = (reward.coherence(steps, final, s) for s in (False, True))
    assert 0.0 <= strict <= paper <= 1.0
    assert len(reward.coherent(steps, final)) == len(steps)
    total, parts = reward.total("".join(steps), steps, True, final)
    assert 0.0 <= total <= 1.6 and parts.keys() == {"acc", "coh", "fmt"}


def combined(left, op, right):
    """(text, value) of both sides -> of the whole."""
    (a, x), (b, y) = left, right
    return f"({a}{op}{b})", {"+": x + y, "-": x - y, "*": x * y}[op]


numbers = st.integers(0, 99).map(lambda n: (str(n), n))
expressions = st.recursive(numbers, lambda part: st.builds(combined, part, st.sampled_from("+-*"), part), max_leaves=4)


@thorough
@given(expressions, st.integers(1, 9))
def test_a_true_step_is_true_and_another_result_is_not(expression, off):
    text, value = expression
    assert reward.true(f"<<{text}={value}>>") and not reward.true(f"<<{text}={value + off}>>")


# ---- problem files ------------------------------------------------------------------------------------------------------

filled = words.filter(lambda t: t.strip() and "### " not in t)
records = st.builds(data.Problem, filled.map(str.strip), st.lists(filled.map(str.strip), max_size=2), filled.map(str.strip))
FILE = Path(tempfile.mkdtemp()) / "problems"


def read(text):
    FILE.write_bytes(text.encode())
    return read_problems(FILE)


@thorough
@given(st.lists(records, min_size=1, max_size=2), st.sampled_from([None, 0, 1]), st.booleans(), st.sampled_from(["", "\ufeff", " \r\n"]))
def test_what_json_writes_is_read(ps, indent, ascii_only, head):
    dicts = [{"question": p.question, "steps": p.steps, "answer": p.answer} for p in ps]
    assert read(head + json.dumps(dicts, indent=indent, ensure_ascii=ascii_only)) == ps
    assert read(head + "\r\n".join(json.dumps(d, ensure_ascii=ascii_only) for d in dicts)) == ps


bare = st.text(st.characters(exclude_categories=("Cs", "Cc", "Z"), exclude_characters="|#\ufeff[{"), min_size=1, max_size=12)
step = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters="|#>"), max_size=12).map("<<{}>>".format)


@thorough
@given(st.lists(st.builds(data.Problem, bare, st.lists(step, max_size=2), bare), min_size=1, max_size=2))
def test_what_icot_writes_is_read(ps):
    found = read("".join(f"{p.question}||{' '.join(p.steps)} #### {p.answer}\n" for p in ps))
    assert found == ps and [p.at for p in found] == [f"{FILE}:{i}" for i in range(1, len(ps) + 1)]


GOOD = json.dumps([{"question": "a", "steps": ["<<1+1=2>>"], "answer": "2"}, {"question": "b", "steps": [], "answer": "3"}], indent=1)
FILES = [GOOD, "\n".join(json.dumps(d) for d in json.loads(GOOD)), "a||<<1+1=2>> #### 2\nb|| #### 3\n"]

FRAGMENTS = ["[", "]", "{", "}", '"', "null", "1e999", "\\ud800"]


@thorough
@given(st.sampled_from(FILES), st.integers(0, 200), st.integers(0, 20), st.one_of(words, st.sampled_from(FRAGMENTS)))
def test_a_damaged_file_is_read_or_refused_with_its_place(text, at, removed, added):
    at = min(at, len(text))
    try:
        found = read(text[:at] + added + text[at + removed:])
    except UserError as e:
        assert str(e).startswith(f"{FILE}:")
    else:
        assert found and all(p.question.strip() and p.answer.strip() and all(s.strip() for s in p.steps) for p in found)


# ---- tokens -------------------------------------------------------------------------------------------------------------

CONFORMANCE = Path(__file__).parent / "fixtures" / "conformance" / "policy" / "tokenizer.json"
TOKENS = {"ours": train_tokenizer(problems.generate("labelled", 200, 0), 500),
          "theirs": Tokenizer(Tokenizer.from_file(str(CONFORMANCE)), 384, (385, 386))}
CONTROL = [START, LATENT, END, "<|bos|>", "<|eos|>", "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<s>", "</s>"]
CONTROL += [TOKENS["theirs"].tokenizer.id_to_token(i) for i in (384, 385, 386)]


@pytest.mark.parametrize("name", TOKENS)
@thorough
@given(st.lists(st.one_of(words, near, st.sampled_from(CONTROL), st.sampled_from(["<|", "|>", "start-latent"])), max_size=4).map("".join))
def test_text_comes_back_and_never_holds_a_control_token(name, text):
    tokenizer = TOKENS[name]
    ids, control = tokenizer.encode(text), {tokenizer.bos, *tokenizer.eos, tokenizer.start, tokenizer.latent, tokenizer.end}
    assert tokenizer.decode(ids) == text and not control & set(ids) and max(ids, default=0) < len(tokenizer)
    assert tokenizer.encode_all([text, "x"]) == [ids, tokenizer.encode("x")]
    prompt = tokenizer.prompt(text)
    assert (prompt[0], prompt[-1]) == (tokenizer.bos, tokenizer.start) and not control & set(prompt[1:-1])


def test_names_of_control_tokens_that_a_tokenizer_holds_as_plain_words_are_no_way_in():
    """As `tokenizer.add_tokens` of Hugging Face leaves them: not special."""
    tokenizer = Tokenizer.from_file(str(CONFORMANCE))
    tokenizer.add_control_tokens([START, LATENT, END])
    tokenizer = Tokenizer(tokenizer, 384, (385, 386))
    for name in (START, LATENT, END):
        assert tokenizer.decode(tokenizer.encode(f"a {name} b")) == f"a {name} b" and len(tokenizer.encode(name)) > 1
