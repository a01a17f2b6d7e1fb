"""The built-in task, the tokenizer, and batches."""

import re

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minatp import data, problems, reward
from minatp.tokenizer import Tokenizer, train_tokenizer

from small import small_model

STEP = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>")

# ---- the built-in task ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets():
    """400 problems of each set."""
    return {which: problems.generate(which, 400, 7) for which in problems.SETS}


def test_a_set_is_the_same_for_the_same_seed(sets):
    for which, of_seed_7 in sets.items():
        assert problems.generate(which, 400, 7) == of_seed_7
    assert problems.generate("test", 400, 8) != sets["test"]


def test_no_question_is_in_two_sets(sets):
    questions = {}
    for which, of_seed_7 in sets.items():
        of_seed_8 = problems.generate(which, 3000, 8)
        questions[which] = {p.question for p in of_seed_7 + of_seed_8}

    # "longer" shares its buckets with "test", but none of its questions
    for a in sets:
        for b in sets:
            assert a == b or not questions[a] & questions[b]


def test_every_step_is_right_and_leads_to_the_answer(sets):
    assert not any(p.steps for p in sets["answers"])
    for which in sets.keys() - {"answers"}:
        for p in sets[which]:
            assert 1 <= len(p.steps) <= 6
            assert reward.same(str(reward.result(p.steps[-1])), p.answer)
            assert all(reward.links(p.steps, p.answer)), p
            for step in p.steps:
                a, op, b, result = STEP.fullmatch(step).groups()
                assert calculate(int(a), op, int(b)) == int(result)


def calculate(a, op, b):
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    return a * b if op == "*" else a / b


def test_how_many_steps_problems_have(sets):
    assert {len(p.steps) for p in sets["test"]} == {1, 2, 3, 4}
    assert {len(p.steps) for p in sets["longer"]} == {5, 6}


def test_some_problems_have_several_step_orders():
    """Equivalent orders of the same steps, which a question does not tell apart: the paper's reason
    to plan.
    """
    orders = set()
    for p in problems.generate("labelled", 3000, 0):
        if len(p.steps) != 4 or "coins are left" not in p.question:
            continue
        # "Ann has 30 coins and buys 2 pens at 3 coins each and 4 cups at 5 coins each."
        _, n_first, _, n_second, _ = re.findall(r"\d+", p.question)
        n = re.match(r"<<(\d+)", p.steps[0])[1]
        begins_with = {n_first: "first", n_second: "second"}[n]
        operations = "".join(STEP.fullmatch(step)[2] for step in p.steps)
        orders.add((begins_with, operations))

    # both products and their sum, or one product at a time
    for begins_with in ("first", "second"):
        assert (begins_with, "**+-") in orders
        assert (begins_with, "*-*-") in orders


# ---- spellings of a question ---------------------------------------------------------------------


def test_spellings_of_one_question_have_one_normal_form():
    plain = 'lena\'s "short" walk takes 12 minutes.'
    for spelling in (
        "Lena’s “short” walk takes 12 minutes.",
        '  lena\'s  "short"\nwalk takes\N{NO-BREAK SPACE}12 minutes. ',
        'LENA\'S "SHORT" WALK TAKES １２ MINUTES.',
    ):
        assert problems.normal_form(spelling) == plain
    assert problems.normal_form("Lena has 12 jars.") != problems.normal_form("Lena has 1 2 jars.")


# ---- the tokenizer -------------------------------------------------------------------------------


def test_tokenizer_reads_back_what_it_wrote_and_knows_no_injection():
    tokenizer = train_tokenizer(problems.generate("labelled", 500, 0), 600)
    assert len(tokenizer) <= 600
    control = {tokenizer.bos, *tokenizer.eos, tokenizer.start, tokenizer.latent, tokenizer.end}
    texts = (
        "Ann has 12 pens.",
        "<<5+3=8>>\n",
        "### 19",
        "naïve ünïcode → 🙂 \t x",
        "<|start-latent|> <|eos|>",
        "  two  spaces ",
    )
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not control & set(ids), text

    # frequent words and whole numbers are one token each
    assert len(tokenizer.encode("### 19")) == 2
    assert len(tokenizer.encode("<<12+7=19>>\n")) == 7


# ---- where the answer begins ---------------------------------------------------------------------


def byte_level(*texts, split=(), **byte_level_options):
    """A byte-level BPE that has learned the words of some texts: a Tokenizer.

    split: pre-tokenizers that come before ByteLevel.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, **byte_level_options)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, last])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([text for text in texts for _ in range(9)], trainer)
    return Tokenizer(backend, bos=0, eos=(1,))


def trimming(tokenizer):
    """The same, whose offsets leave out the spaces of a token, as RoBERTa's do."""
    tokenizer.backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


# What makes each tokenizer, and the pieces of "### 19" and of "### -5"
TOKENIZERS = {
    "trained": (
        lambda: train_tokenizer(problems.generate("labelled", 300, 0), 600),
        ["### ", "19"],
        None,
    ),
    "space and number": (lambda: byte_level("### 19"), ["###", " 19"], None),
    "the same, trimmed": (lambda: trimming(byte_level("### 19")), ["###", " 19"], None),
    "all in one": (
        lambda: byte_level("### 1", "### -", use_regex=False),
        ["### 1", "9"],
        ["### -", "5"],
    ),
    "single digits": (
        lambda: byte_level("### 19", split=[pre_tokenizers.Digits(individual_digits=True)]),
        ["###", " ", "1", "9"],
        ["###", " ", "-", "5"],
    ),
    "single bytes": (lambda: byte_level(), list("### 19"), list("### -5")),
}


def test_a_token_that_covers_the_place_of_a_split_comes_after_it():
    tokenizer = byte_level("9=-5")
    (first, n_first), (second, n_second) = tokenizer.encode_split(["4-9=-5", "4+9=13"], [4, 4])
    assert [tokenizer.decode([i]) for i in first] == ["4", "-", "9", "=-", "5"]
    assert n_first == 3
    assert tokenizer.decode(second[:n_second]) == "4+9="


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_position_is_the_last_before_a_character_of_the_answer(name):
    """Found a second time from the text of each id, for the whole problem and for a part of it."""
    make, of_19, of_minus_5 = TOKENIZERS[name]
    tokenizer = make()

    def pieces(ids):
        return [tokenizer.decode([i]) for i in ids]

    assert pieces(tokenizer.encode("### 19")) == of_19
    assert of_minus_5 is None or pieces(tokenizer.encode("### -5")) == of_minus_5

    model, _ = small_model(method="codi")
    model.end = tokenizer.end
    answers = ["19", "-5", "1,200", "7", "0.5", "−3", "50%"]
    steps = ["<<5+7=12>>", "<<12*2=24>>", "<<24-5=19>>"]
    of_answers = [problems.Problem("A?", steps[: i % 4], a) for i, a in enumerate(answers)]
    rows = data.encode(of_answers, tokenizer, model)
    for stage in (1, 3):
        batch = data.collate(rows, stage, model, distills=True)
        for b, problem in enumerate(of_answers):
            whole = "".join(step + "\n" for step in problem.steps)
            rest = "".join(step + "\n" for step in problem.steps[1:]) if stage == 1 else ""
            words, text = batch.words.ids[b].tolist(), batch.text.ids[b].tolist()
            for ids, at, before in (
                (words, batch.words.answer_at, whole),
                (text, batch.text.answer_at, rest),
            ):
                assert at[0][b] == b
                column = at[1][b].item()
                next_id = [*ids, *tokenizer.eos][column + 1]
                read = len("".join(pieces(ids[1 : column + 1])))
                assert read <= len(before + "### "), (problem.answer, stage)
                if next_id not in tokenizer.eos:
                    assert read + len(pieces([next_id])[0]) > len(before + "### ")


# ---- encoding ------------------------------------------------------------------------------------


def test_a_problem_longer_than_the_context_is_refused():
    """Its length is that of the stage at which it is longest, with <|end-latent|> and eos."""
    model, tokenizer = small_model()
    problem = problems.Problem("Ann has 5 pens. How many?", ["<<5+1=6>>"] * 3, "6", "a.json:7")
    [row] = data.encode([problem], tokenizer, model)

    # each step takes 6 tokens and a line break as text, and 2 latents
    length = row.length + 1
    model.policy.cfg.block_size = length
    data.encode([problem], tokenizer, model)
    model.policy.cfg.block_size = length - 1
    with pytest.raises(ValueError, match=f"^a.json:7: the problem is {length} tokens long"):
        data.encode([problem], tokenizer, model)


# ---- batches -------------------------------------------------------------------------------------


def test_batches_give_everything_once_an_epoch():
    order = data.batches([1] * 12, 4, seed=3)
    seen = []
    for _ in range(6):  # two epochs
        seen += next(order)
    first_epoch, second_epoch = seen[:12], seen[12:]
    assert sorted(first_epoch) == list(range(12))
    assert sorted(second_epoch) == list(range(12))
    assert first_epoch != second_epoch


def test_batches_group_like_lengths():
    lengths = list(range(640))
    order = data.batches(lengths, 10, seed=3)
    for _ in range(64):
        batch = next(order)
        # ten neighbours of a sorted pool of 160, out of 0 … 639
        assert max(batch) - min(batch) < 320


def test_left_padding_aligns_the_latents():
    rows = data.pad([[1], [1, 2, 3]], 9, left=True)
    assert torch.equal(rows, torch.tensor([[9, 9, 1], [1, 2, 3]]))


def test_the_worked_example_of_the_docs():
    """docs/method.md, One batch, worked out: two problems at stages 1, 2 and K + 1."""
    model, tokenizer = small_model()
    model.c, model.K = 1, 4
    three = ["<<5+7=12>>", "<<12*2=24>>", "<<24-4=20>>"]
    pair = [problems.Problem("A?", three[:1], "12"), problems.Problem("B?", three, "20")]
    rows = data.encode(pair, tokenizer, model)
    layout = {}
    for stage in (1, 2, 5):
        batch = data.collate(rows, stage, model)
        layout[stage] = (
            batch.thinking.n_latent.tolist(),
            batch.thinking.has_stop.tolist(),
            (batch.thinking.L, batch.thinking.n_candidate),
            [batch.counts[name] for name in ("dec", "stop", "kl")],
        )
    assert layout == {
        1: ([1, 1], [False, False], (1, 1), [2, 2, 2]),
        2: ([1, 2], [True, False], (2, 2), [3, 4, 3]),
        5: ([1, 3], [True, True], (3, 4), [4, 6, 4]),
    }


def test_a_batch_knows_where_its_labels_are():
    """c = 2. B uses both latent steps, A stops after one, and of C the answer alone is known."""
    model, tokenizer = small_model()
    model.c, model.K = 2, 2
    two = ["<<5+7=12>>", "<<12*2=24>>"]
    pair = [problems.Problem("A?", two[:1], "12"), problems.Problem("B?", two, "24")]
    rows = data.encode(pair, tokenizer, model)
    rows += data.encode([problems.Problem("C?", [], "7")], tokenizer, model, answer_only=True)
    batch = data.collate(rows, model.K + 1, model)

    def pairs(at):
        return list(zip(*(index.tolist() for index in at)))

    assert pairs(batch.thinking.used_at) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert pairs(batch.thinking.stop_at) == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert batch.thinking.stop_label.tolist() == [0, 1, 0, 0]

    # words: what is gathered is what was put in
    answers = [i for row in rows for i in row.answer]
    assert batch.text.target[batch.text.target_at].tolist() == answers
    texts = [*rows[0].step_texts, *rows[1].step_texts]
    assert batch.steps.target[batch.steps.target_at].tolist() == [i for text in texts for i in text]


def test_a_batch_moves_with_its_indices():
    model, tokenizer = small_model()
    rows = data.encode(problems.generate("labelled", 3, 1), tokenizer, model)
    batch = data.collate(rows, model.K + 1, model)
    assert batch.to("meta").steps.unseen is None
    batch.steps.hide(data.draw_unseen(rows, model.K, 0.5, torch.Generator()))
    moved = batch.to("meta")
    assert moved.steps.unseen.is_meta
    assert moved.thinking.L == batch.thinking.L
    assert moved.prompt.is_meta

    thinking = moved.thinking
    at = (moved.text.target_at, thinking.used_at, thinking.stop_at, moved.steps.target_at)
    assert all(index.is_meta for pair in at for index in pair)
    assert [len(pair) for pair in at] == [2] * 4
    assert moved.words is None

    moved = data.collate(rows, model.K + 1, model, distills=True).to("meta")
    words = moved.words
    at = (words.target_at, words.answer_at, moved.text.answer_at)
    assert all(index.is_meta for pair in at for index in pair)
    assert words.ids.is_meta and words.mask.is_meta and words.target.is_meta


# ---- what takes the place of steps ---------------------------------------------------------------


def rows_of_all_lengths(model, tokenizer):
    """Problems of no step, of one and of K + 1, and an answer alone."""
    steps = ["<<5+7=12>>", "<<12*2=24>>", "<<24-5=19>>"]
    known = [problems.Problem("A?", steps[:n], "19") for n in (0, 1, 3)]
    alone = [problems.Problem("B?", [], "7")]
    rows = data.encode(known, tokenizer, model, takes_all_steps=True)
    return rows + data.encode(alone, tokenizer, model, answer_only=True, takes_all_steps=True)


@pytest.mark.parametrize("method, n_filler", [("icot", 0), ("pause", 2)])
@pytest.mark.parametrize("stage", range(4))
def test_steps_go_for_nothing_or_for_fillers(method, n_filler, stage):
    """The first k steps go. Every problem reads c fillers for each of them, whatever it has."""
    model, tokenizer = small_model(method=method)  # K = 2, c = 2
    rows = rows_of_all_lengths(model, tokenizer)
    batch = data.collate(rows, stage, model)
    assert (batch.thinking.L, batch.thinking.n_candidate, batch.steps.row.tolist()) == (0, 0, [])

    fillers = [tokenizer.latent] * n_filler * min(stage, 2)
    for b, row in enumerate(rows):
        left = row.lines[stage:] if stage < 3 else []
        written = [i for line in left for i in line] + row.answer
        read = [*fillers, tokenizer.end, *written[:-1]]
        assert batch.text.ids[b][batch.text.mask[b]].tolist() == read
        labels = [data.IGNORE] * len(fillers) + written
        assert batch.text.target[b][batch.text.mask[b]].tolist() == labels
    n_written = int((batch.text.target != data.IGNORE).sum())
    assert batch.counts["enc"] == n_written
    assert batch.counts["position"] == sum(len(row.prompt) for row in rows) + int(
        batch.text.mask.sum()
    )


@pytest.mark.parametrize("method, n_filler", [("icot", 0), ("pause", 4)])
def test_fillers_count_in_the_context(method, n_filler):
    """A problem without steps fits beside its fillers, and not beside one more."""
    model, tokenizer = small_model(method=method)
    problem = [problems.Problem("Ann has 5 pens. How many?", [], "5")]
    [row] = data.encode(problem, tokenizer, model, takes_all_steps=True)
    length = row.length + 1 + n_filler  # 1: <|end-latent|>

    model.policy.cfg.block_size = length
    data.encode(problem, tokenizer, model, takes_all_steps=True)
    model.policy.cfg.block_size = length - 1
    with pytest.raises(ValueError, match=f"is {length} tokens long"):
        data.encode(problem, tokenizer, model, takes_all_steps=True)


def test_codi_takes_all_its_latents_for_every_problem():
    """From its first stage, which is its last; φ reads the steps that exist, the K-th with more."""
    model, tokenizer = small_model(method="codi-sim-cot")  # K = 2, c = 2
    rows = rows_of_all_lengths(model, tokenizer)
    batch = data.collate(rows, 3, model, distills=True)
    assert batch.thinking.n_latent.tolist() == [4] * 4
    assert batch.thinking.n_candidate == batch.thinking.L == 4
    assert not batch.thinking.has_stop.any()
    for b, row in enumerate(rows):
        assert batch.text.ids[b][batch.text.mask[b]].tolist() == [tokenizer.end, *row.answer[:-1]]

    # problem 1 has one step, problem 2 three, of which the last two are the second thought's
    assert (batch.steps.row.tolist(), batch.steps.index.tolist()) == ([1, 2, 2], [0, 0, 1])
    texts = [rows[1].step_texts[0], rows[2].step_texts[0], rows[2].rest_text]
    assert batch.steps.target[batch.steps.target_at].tolist() == [i for text in texts for i in text]

    # the teacher reads all of them in words, where they are known
    for b, row in enumerate(rows[:3]):
        words = [tokenizer.end, *(i for line in row.lines for i in line), *row.answer]
        assert batch.words.ids[b][batch.words.mask[b]].tolist() == words[:-1]
        assert batch.words.target[b][batch.words.mask[b]].tolist() == words[1:]
    assert batch.words.answer_at[0].tolist() == batch.text.answer_at[0].tolist() == [0, 1, 2]
    assert not batch.words.mask[3].any()


def test_a_batch_goes_to_a_gpu_from_pinned_memory_and_the_host_does_not_wait():
    class OnTheHost:
        is_cuda = is_pinned = False

        def pin_memory(self):
            pinned = OnTheHost()
            pinned.is_pinned = True
            return pinned

        def to(self, device, non_blocking=False):
            return device, self.is_pinned and non_blocking

    assert data.moved(OnTheHost(), "cuda:1") == ("cuda:1", True)
    assert data.moved(OnTheHost(), "cpu") == ("cpu", False)
