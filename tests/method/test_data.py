"""Problems, tokenizer and batches."""
import re

import pytest
import torch

from minatp import data, problems, reward


def test_sets_are_disjoint_seeded_and_exact():
    sets = {which: problems.generate(which, 400, 7) for which in problems.SETS}
    assert sets == {which: problems.generate(which, 400, 7) for which in sets}
    assert sets["test"] != problems.generate("test", 400, 8)
    more = {which: problems.generate(which, 3000, 8) for which in sets}
    questions = {which: {p.question for p in more[which] + sets[which]} for which in sets}
    for a in sets:
        for b in sets:
            assert a == b or not questions[a] & questions[b]
    assert not any(p.steps for p in sets.pop("answers"))
    for p in (p for ps in sets.values() for p in ps):
        assert 1 <= len(p.steps) <= 6 and reward.same(str(reward.result(p.steps[-1])), p.answer)
        assert all(reward.coherent(p.steps, p.answer)), p
        for s in p.steps:
            a, op, b, c = re.fullmatch(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", s).groups()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[op] == int(c)
    assert {len(p.steps) for p in sets["test"]} == {1, 2, 3, 4} and {len(p.steps) for p in sets["longer"]} == set(problems.LONGER)


def test_some_problems_have_several_step_orders():
    """Equivalent orders of the same steps, which a question does not tell apart: the paper's reason to plan."""
    shopping = [p for p in problems.generate("labelled", 3000, 0) if len(p.steps) == 4 and "coins are left" in p.question]
    seen = set()
    for p in shopping:
        money, a, _, b, _ = re.findall(r"\d+", p.question)
        first = {a: "first", b: "second"}[re.match(r"<<(\d+)", p.steps[0])[1]]
        seen.add((first, "".join(re.findall(r"(?<=\d)[-+*/]", " ".join(p.steps)))))
    assert seen >= {(who, ops) for who in ("first", "second") for ops in ("**+-", "*-*-")}


def test_tokenizer_reads_back_what_it_wrote_and_knows_no_injection():
    tokenizer = train_tokenizer(problems.generate("labelled", 500, 0), 600)
    assert len(tokenizer) <= 600
    for text in ("Ann has 12 pens.", "<<5+3=8>>\n", "### 19", "naïve ünïcode → 🙂 \t x", "<|start-latent|> <|eos|>", "  two  spaces "):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos, *tokenizer.eos, tokenizer.start, tokenizer.latent, tokenizer.end} & set(ids), text
    assert len(tokenizer.encode("### 19")) == 2 and len(tokenizer.encode("<<12+7=19>>\n")) == 7


FORMATS = {
    "list.json": '[{"question": "Q 1", "steps": ["<<1+2=3>>"], "answer": "3"},\n {"question": "R", "steps": [], "answer": "4"}]',
    "lines.jsonl": '{"question": "Q 1", "steps": ["<<1+2=3>>"], "answer": "3"}\n\n{"question": "R", "steps": [], "answer": "4"}\n',
    "icot.txt": "Q 1||<<1+2=3>> #### 3\nR|| #### 4\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_three_formats_read_the_same(name, tmp_path):
    (tmp_path / name).write_text(FORMATS[name])
    assert read_problems(tmp_path / name) == [data.Problem("Q 1", ["<<1+2=3>>"], "3"), data.Problem("R", [], "4")]


def test_batches_give_everything_once_an_epoch():
    order = data.batches([1] * 12, 4, seed=3)
    seen = [i for _ in range(6) for i in next(order)]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:]


def test_batches_group_like_lengths():
    lengths = torch.arange(640).tolist()
    for batch, _ in zip(data.batches(lengths, 10, seed=3), range(64)):
        # ten neighbours of a sorted pool of 160, out of 0 … 639
        assert max(batch) - min(batch) < 320


def test_left_padding_aligns_the_latents():
    rows = data.pad([[1], [1, 2, 3]], 9, left=True)
    assert torch.equal(rows, torch.tensor([[9, 9, 1], [1, 2, 3]]))
