"""Problem files: three formats, sets as they are published, and what must hold for every text."""

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


# ---- sets as they are published ------------------------------------------------------------------

GSM8K = [
    {
        "question": "A box holds 12 pens. How many pens do 3 boxes and 1,214 more pens make?",
        "answer": "Three boxes hold 12*3=<<12*3=36>>36 pens.\n"
        "With the others there are 36+1214=$<<36+1214=1250>>1250.\n#### 1,250",
    }
]
GSM_HARD = [
    {"input": "How many do 3 boxes of 5234125 hold?", "code": "…", "target": 15702375.0},
    {"input": "Half of 0.0000040214 g?", "code": "", "target": 2.0107e-06},
    {"input": "A third of 9732141.3?", "code": "", "target": 3244047.0999999996},
    {"input": "A debt of 5 grows by 7.", "code": "", "target": -12},
]
SVAMP = [
    {"ID": "1", "Body": "Ann had 9 pens. ", "Question": "How many?", "Answer": 9.0, "Type": "…"},
    {"ID": "2", "Body": "A pie costs $ 4", "Question": "Of 8?", "Answer": 0.5, "Type": "…"},
]
MULTIARITH = [
    {"iIndex": 1, "sQuestion": " How many? ", "lEquations": ["X=21.0"], "lSolutions": [21.0]}
]


@pytest.mark.parametrize(
    "records, problems",
    [
        (GSM8K, [Problem(GSM8K[0]["question"], ["<<12*3=36>>", "<<36+1214=1250>>"], "1,250")]),
        (
            GSM_HARD,
            [
                Problem("How many do 3 boxes of 5234125 hold?", [], "15702375"),
                Problem("Half of 0.0000040214 g?", [], "2.0107e-06"),
                Problem("A third of 9732141.3?", [], "3244047.0999999996"),
                Problem("A debt of 5 grows by 7.", [], "-12"),
            ],
        ),
        (
            SVAMP,
            [
                Problem("Ann had 9 pens. How many?", [], "9"),
                Problem("A pie costs $ 4 Of 8?", [], "0.5"),
            ],
        ),
        (MULTIARITH, [Problem("How many?", [], "21")]),
    ],
    ids=["GSM8K", "GSM-Hard", "SVAMP", "MultiArith"],
)
def test_published_sets_are_read_as_they_are(records, problems, tmp_path):
    (tmp_path / "list").write_text(json.dumps(records, indent=1))
    (tmp_path / "lines").write_text("\n".join(json.dumps(record) for record in records))
    assert read_problems(tmp_path / "list") == problems
    assert read_problems(tmp_path / "lines") == problems


def test_where_no_answer_is_needed_a_published_one_may_be_missing(tmp_path):
    (tmp_path / "lines").write_text('{"input": "How many?"}')
    assert read_problems(tmp_path / "lines", answers=False) == [Problem("How many?", [], "")]


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
    *(json.dumps(records, indent=1) for records in (GSM8K, GSM_HARD, SVAMP, MULTIARITH)),
]
FRAGMENTS = ["[", "]", "{", "}", '"', "null", "1e999", "NaN", "\\ud800"]


@thorough
@given(
    st.sampled_from(WHOLE_FILES),
    st.integers(0, 300),
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
