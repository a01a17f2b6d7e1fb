"""What must hold for every text: the parsers of answers and of coherence, and the tokenizer."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st

from minatp import problems, reward
from minatp.run.options import Config
from minatp.tokenizer import END, LATENT, START, Tokenizer, train_tokenizer

from properties import almost_numbers, any_text, thorough, words
from runs import MODEL

# ---- answers -------------------------------------------------------------------------------------


def spellings(n, places):
    """n / 10**places as people write it."""
    value = n / 10**places
    plain = f"{value:.{places}f}"
    with_commas = f"{value:,.{places}f}"
    with_zero = plain + ("0" if places else ".0")
    texts = [plain, with_commas, with_zero, f" {plain} ", f"{plain}%"]
    if n >= 0:
        texts.append(f"${plain}")
    return texts


@thorough
@given(st.integers(-(10**6), 10**6), st.integers(0, 4), words)
def test_an_answer_is_read_in_every_spelling_and_is_no_other_number(n, places, before):
    assume("### " not in before)
    value = Fraction(n, 10**places)
    plain = spellings(n, places)[0]
    for text in spellings(n, places):
        written = before + "### " + text
        assert reward.number(text) == value
        assert reward.answer(written) == text.strip()

        assert reward.accuracy(written, plain) == 1.0
        assert reward.accuracy(written, str(n + 1)) == float(value == n + 1)
        assert reward.form("### " + text, True) == 1.0
        assert reward.form(written, False) == 0.0


@thorough
@given(any_text, any_text)
def test_any_text_is_judged(a, b):
    number = reward.number(a)
    assert number is None or type(number) is Fraction

    assert reward.same(a, b) == reward.same(b, a)
    assert reward.same(a, a)
    assert not reward.same(a, None)

    accuracy, form = reward.accuracy(a, b), reward.form(a, True)
    assert accuracy in (0.0, 1.0)
    assert form in (0.0, 1.0)
    if "### " in a:
        assert reward.answer(a) is not None
    else:
        assert reward.answer(a) is None
        assert accuracy == form == 0.0


# ---- coherence -----------------------------------------------------------------------------------

operands = st.integers(0, 12)
equations = st.tuples(operands, st.sampled_from("+-*/"), operands, operands)


@thorough
@given(st.lists(equations, max_size=4), operands)
def test_coherence_is_what_its_definition_says(equations, final):
    steps = [f"<<{a}{op}{b}={result}>>" for a, op, b, result in equations]
    expected = []
    for i, (_, _, _, result) in enumerate(equations):
        is_used = any(result in (a, b) for a, _, b, _ in equations[i + 1 :])
        expected.append(is_used or result == final)

    used = [bool(users) for users in reward.links(steps, str(final))]
    assert used == expected
    share = sum(expected) / len(steps) if steps else 0.0
    assert reward.coherence(steps, str(final)) == share


@thorough
@given(st.lists(any_text, max_size=4), st.one_of(st.none(), almost_numbers))
def test_any_steps_are_judged(steps, final):
    paper = reward.coherence(steps, final)
    strict = reward.coherence(steps, final, strict=True)
    assert 0.0 <= strict <= paper <= 1.0
    assert len(reward.links(steps, final)) == len(steps)

    chain = SimpleNamespace(text="".join(steps), steps=steps, ended=True)
    for no_answers in (False, True):
        R, terms = reward.chain_reward(Config(no_answers=no_answers), chain, final or "")
        assert 0.0 <= R <= 1.6
        assert terms.keys() == ({"coh", "fmt"} if no_answers else {"acc", "coh", "fmt"})


def with_value(n):
    return str(n), n


def combine(left, op, right):
    """(text, value) of both sides -> (text, value) of the whole."""
    (left_text, x), (right_text, y) = left, right
    value = {"+": x + y, "-": x - y, "*": x * y}[op]
    return f"({left_text}{op}{right_text})", value


def extend(parts):
    return st.builds(combine, parts, st.sampled_from("+-*"), parts)


expressions = st.recursive(st.integers(0, 99).map(with_value), extend, max_leaves=4)


@thorough
@given(expressions, st.integers(1, 9))
def test_a_true_step_is_true_and_another_result_is_not(expression, error):
    text, value = expression
    assert reward.true(f"<<{text}={value}>>")
    assert not reward.true(f"<<{text}={value + error}>>")


# ---- tokens --------------------------------------------------------------------------------------


def load_fixture():
    """The `tokenizers.Tokenizer` of the conformance fixture, a Hugging Face directory."""
    return tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))


TOKENIZERS = {
    "ours": train_tokenizer(problems.generate("labelled", 200, 0), 500),
    "theirs": Tokenizer(load_fixture(), bos=384, eos=(385, 386)),
}
CONTROL_NAMES = [
    *(START, LATENT, END),
    *("<|bos|>", "<|eos|>", "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<s>", "</s>"),
    *(TOKENIZERS["theirs"].backend.id_to_token(i) for i in (384, 385, 386)),
]

# text that may hold the name of a control token, or a part of one
names_of_control = st.sampled_from(CONTROL_NAMES)
parts_of_names = st.sampled_from(["<|", "|>", "start-latent"])
fragments = st.one_of(words, almost_numbers, names_of_control, parts_of_names)
texts = st.lists(fragments, max_size=4).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@thorough
@given(texts)
def test_text_comes_back_and_never_holds_a_control_token(name, text):
    tokenizer = TOKENIZERS[name]
    control = {tokenizer.bos, *tokenizer.eos, tokenizer.start, tokenizer.latent, tokenizer.end}
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not control & set(ids)
    assert max(ids, default=0) < len(tokenizer)
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]

    prompt = tokenizer.prompt(text)
    assert (prompt[0], prompt[-1]) == (tokenizer.bos, tokenizer.start)
    assert not control & set(prompt[1:-1])


def test_names_of_control_tokens_that_a_tokenizer_holds_as_plain_words_are_no_way_in():
    """`tokenizer.add_tokens` of Hugging Face leaves them so: not special."""
    backend = load_fixture()
    backend.add_tokens([START, LATENT, END])
    tokenizer = Tokenizer(backend, bos=384, eos=(385, 386))
    for name in (START, LATENT, END):
        text = f"a {name} b"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(name)) > 1
