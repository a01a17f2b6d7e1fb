"""Problem files: three formats, and what must hold for every text in them."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minatp.problems import Problem
from minatp.run.errors import UserError
from minatp.run.problem_files import read_problems

from properties import thorough, words

FORMATS = {
    "list.json": (
        '[{"question": "Q 1", "steps": ["<<1+2=3>>"], "answer": "3"},\n'
        ' {"question": "R", "steps": [], "answer": "4"}]'
    ),
    "lines.jsonl": (
        '{"question": "Q 1", "steps": ["<<1+2=3>>"], "answer": "3"}\n\n'
        '{"question": "R", "steps": [], "answer": "4"}\n'
    ),
    "icot.txt": "Q 1||<<1+2=3>> #### 3\nR|| #### 4\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_three_formats_read_the_same(name, tmp_path):
    (tmp_path / name).write_text(FORMATS[name])
    assert read_problems(tmp_path / name) == [
        Problem("Q 1", ["<<1+2=3>>"], "3"),
        Problem("R", [], "4"),
    ]


# ---- every text ----------------------------------------------------------------------------------

FILE = Path(tempfile.mkdtemp()) / "problems"


def write_and_read(text):
    FILE.write_bytes(text.encode())
    return read_problems(FILE)


def is_valid(text):
    """Whether a text may be a question, a step or an answer."""
    return bool(text.strip()) and "### " not in text


valid = words.filter(is_valid).map(str.strip)
valid_problems = st.builds(Problem, valid, st.lists(valid, max_size=2), valid)
file_starts = st.sampled_from(["", "\ufeff", " \r\n"])


@thorough
@given(
    st.lists(valid_problems, min_size=1, max_size=2),
    st.sampled_from([None, 0, 1]),
    st.booleans(),
    file_starts,
)
def test_what_json_writes_is_read(problems, indent, ascii_only, start):
    records = [{"question": p.question, "steps": p.steps, "answer": p.answer} for p in problems]
    as_list = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    assert write_and_read(start + as_list) == problems

    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    assert write_and_read(start + "\r\n".join(lines)) == problems


# iCoT has no escapes: neither line breaks, nor what separates its parts
icot_questions = st.text(
    st.characters(
        exclude_categories=("Cs", "Cc", "Z"),
        exclude_characters="|#\ufeff[{",
    ),
    min_size=1,
    max_size=12,
)
icot_steps = st.text(
    st.characters(
        exclude_categories=("Cs", "Cc", "Zl", "Zp"),
        exclude_characters="|#>",
    ),
    max_size=12,
).map("<<{}>>".format)
icot_problems = st.builds(
    Problem,
    icot_questions,
    st.lists(icot_steps, max_size=2),
    icot_questions,
)


@thorough
@given(st.lists(icot_problems, min_size=1, max_size=2))
def test_what_icot_writes_is_read(problems):
    lines = [f"{p.question}||{' '.join(p.steps)} #### {p.answer}\n" for p in problems]
    read = write_and_read("".join(lines))
    assert read == problems
    assert [p.source for p in read] == [f"{FILE}:{i}" for i in range(1, len(problems) + 1)]


# ---- damaged files -------------------------------------------------------------------------------

RECORDS = [
    {"question": "a", "steps": ["<<1+1=2>>"], "answer": "2"},
    {"question": "b", "steps": [], "answer": "3"},
]
WHOLE_FILES = [
    json.dumps(RECORDS, indent=1),
    "\n".join(json.dumps(record) for record in RECORDS),
    "a||<<1+1=2>> #### 2\nb|| #### 3\n",
]
FRAGMENTS = ["[", "]", "{", "}", '"', "null", "1e999", "\\ud800"]


@thorough
@given(
    st.sampled_from(WHOLE_FILES),
    st.integers(0, 200),
    st.integers(0, 20),
    st.one_of(words, st.sampled_from(FRAGMENTS)),
)
def test_a_damaged_file_is_read_or_refused_with_its_place(text, start, n_removed, inserted):
    start = min(start, len(text))
    damaged = text[:start] + inserted + text[start + n_removed :]
    try:
        problems = write_and_read(damaged)
    except UserError as e:
        assert str(e).startswith(f"{FILE}:")
        return
    assert problems
    for p in problems:
        assert p.question.strip()
        assert p.answer.strip()
        assert all(step.strip() for step in p.steps)
