"""Problem files: JSON, JSONL and iCoT text. The first character decides which of them it is.

    [     JSON     a list of {"question": "…", "steps": ["<<1+1=2>>", …], "answer": "…"}
    {     JSONL    one such object a line
    …     iCoT     a line each: question||<<1+1=2>> <<2*3=6>> #### answer

JSON is Coconut's format. Objects may also be as GSM8K, GSM-Hard, SVAMP or MultiArith are published;
their fields tell (`as_problem`). Any mistake in a file raises UserError, with its line and what to
do.
"""

import json
import math
import re
from contextlib import contextmanager
from pathlib import Path

from ..problems import Problem
from .errors import UserError


def read_problems(path, answers=True):
    """The Problems of a file. Raises UserError.

    answers: whether every problem needs an answer. If not, it may be empty, and missing in JSON.
    """
    path = Path(path)
    text = read_text(path)
    if text.lstrip().startswith("["):
        return read_json_list(path, text, answers)

    # The other two formats have a problem on each line
    parse_line = parse_icot
    if text.lstrip().startswith("{"):
        parse_line = parse_json
    problems = []
    for i, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            problems.append(parse_line(f"{path}:{i}", line, answers))
    return problems


def read_text(path):
    """The text of a file, which must not be blank. Raises UserError."""
    # utf-8-sig skips the byte order mark with which editors on Windows may begin a file
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{path}:0: cannot be read ({e.strerror}); give a problem file") from None
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}:0: is not UTF-8 text (byte {e.start}); give JSON, JSONL or iCoT text"
        ) from None
    if not text.strip():
        raise UserError(f"{path}:1: is empty; it needs at least one problem")
    return text


# ---- a JSON list ---------------------------------------------------------------------------------


def read_json_list(path, text, answers):
    """The Problems of a JSON list.

    The records are decoded one by one, so that an error names the line its record begins on.
    """
    cursor = Cursor(text)
    cursor.move(text.index("[") + 1)
    if cursor.character == "]":
        raise UserError(f"{path}:1: the list is empty; it needs at least one problem")

    # A record, then a comma and the next one, or the end of the list
    problems = []
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    while True:
        where = f"{path}:{cursor.line}"
        with json_errors(where, "the file may be truncated"):
            record, end = decoder.raw_decode(text, cursor.position)
        problems.append(parse_record(where, record, answers))
        cursor.move(end)
        if cursor.character == "]":
            break
        if cursor.character != ",":
            raise UserError(
                f"{path}:{cursor.line}: expected ',' or ']' after a problem; the file may be "
                "truncated"
            )
        cursor.move(cursor.position + 1)

    # Nothing may follow
    cursor.move(cursor.position + 1)
    if cursor.character:
        raise UserError(
            f"{path}:{cursor.line}: there is text after the end of the list; put one list in a file"
        )
    return problems


class Cursor:
    """A position in a JSON text, always on a character that is not blank, and its line."""

    # JSON's white space, of which \s has more
    blanks = re.compile(r"[ \t\r\n]*")

    def __init__(self, text):
        self.text = text
        self.position, self.line = 0, 1

    def move(self, position):
        """Move forward to `position`, then over the blanks that are there."""
        position = self.blanks.match(self.text, position).end()
        # count the lines of all that is passed, the record and the blanks
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    @property
    def character(self):
        """The character at the position; "" at the end of the text."""
        return self.text[self.position : self.position + 1]


# ---- a line --------------------------------------------------------------------------------------


def parse_json(where, line, answers):
    """A line of JSONL -> Problem. where: "path:line"."""
    with json_errors(where, "each line must be one object"):
        record = json.loads(line, object_pairs_hook=unique_keys)
    return parse_record(where, record, answers)


# As short as possible, so that two steps on a line do not become one
STEP = re.compile("<<.*?>>")


def parse_icot(where, line, answers):
    """A line of iCoT text -> Problem. where: "path:line"."""
    # Nothing but steps may stand before ####: other words would be lost without notice
    question, bars, solution = line.partition("||")
    steps, hashes, answer = solution.partition("####")
    words_between_steps = STEP.sub("", steps).strip()
    if not bars or not hashes or words_between_steps:
        raise UserError(f"{where}: is not `question||<<…>> <<…>> #### answer`; see docs/scaling.md")
    record = {"question": question, "steps": STEP.findall(steps), "answer": answer}
    return parse_record(where, record, answers)


# ---- a record ------------------------------------------------------------------------------------


TEXT, NUMBER = (str, "a string"), ((int, float, str, list), "a number")

# The fields of a problem: their types, and what a message calls those
FIELDS = {"question": TEXT, "steps": (list, "a list of strings"), "answer": TEXT}

# Those of sets that are published without steps. The last one is the answer, and those before it
# are the question
WITHOUT_STEPS = {
    "GSM-Hard": {"input": TEXT, "target": NUMBER},
    "SVAMP": {"Body": TEXT, "Question": TEXT, "Answer": NUMBER},
    "MultiArith": {"sQuestion": TEXT, "lSolutions": NUMBER},
}


def parse_record(where, record, answers):
    """An object of a problem file -> Problem. Raises UserError if it is none.

    It is {"question", "steps", "answer"}, or what `as_problem` makes that of.
    """
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: a problem must be an object, not {type(record).__name__}; give question, "
            "steps and answer"
        )

    # Where no answer is needed, a missing one is an empty one
    record = as_problem(where, record, answers)
    if not answers:
        record = {"answer": "", **record}
    check_fields(where, record, FIELDS, "a problem")
    question, steps, answer = record["question"], record["steps"], record["answer"]
    check_not_empty(where, question, steps, answer if answers else None)

    # The policy writes "### " before its answer, so nothing else may contain it
    if any("### " in text for text in (*steps, answer)):
        raise UserError(
            f'{where}: a step or the answer contains "### ", which begins an answer; write it '
            "differently"
        )
    check_text(where, question, *steps, answer)
    return Problem(question.strip(), [step.strip() for step in steps], answer.strip(), where)


def as_problem(where, record, answers):
    """A record of a published set as {"question", "steps", "answer"}; others are left unchanged.

    answers: whether it needs an answer. Raises UserError.
    """
    # GSM8K: the steps stand within the sentences of its answer, which ends on "#### 72"
    solution = record.get("answer")
    if "steps" not in record and isinstance(solution, str) and "####" in solution:
        sentences, _, answer = solution.rpartition("####")
        return {**record, "steps": STEP.findall(sentences), "answer": answer}

    # The others are told by their first field
    for name, fields in WITHOUT_STEPS.items():
        *parts, last = fields
        if parts[0] in record and "question" not in record:
            if not answers:
                record = {last: "", **record}
            check_fields(where, record, fields, name)
            question = " ".join(record[part].strip() for part in parts)
            answer = number_as_text(where, last, record[last])
            return {"question": question, "steps": [], "answer": answer}
    return record


def number_as_text(where, name, value):
    """The answer in a published set, as text: "72" for 72, 72.0 and [72.0]; 2e-06 as it is.

    A string is left unchanged. Raises UserError if it is no number. name: of its field.
    """
    # MultiArith lists its solutions, of which there is one
    number = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(number, float) and number.is_integer():
        number = int(number)

    # JSON knows neither NaN nor infinity, but Python reads them
    is_finite = isinstance(number, int) or (isinstance(number, float) and math.isfinite(number))
    if isinstance(number, bool) or not (is_finite or isinstance(number, str)):
        raise UserError(f'{where}: "{name}" must be one number, not {json.dumps(value)[:40]}')
    return str(number)


def check_fields(where, record, fields, what):
    """Raise UserError if a record lacks a field, or has one of the wrong type.

    fields: as FIELDS. what: the name of such a record.
    """
    *first, last = fields
    for name, (kind, description) in fields.items():
        if name not in record:
            raise UserError(
                f'{where}: "{name}" is missing; {what} has {", ".join(first)} and {last}'
            )
        value = record[name]
        if not isinstance(value, kind):
            raise UserError(f'{where}: "{name}" must be {description}, not {type(value).__name__}')


def check_not_empty(where, question, steps, answer):
    """Raise UserError if a part of a problem is blank. answer: None if it may be."""
    for step in steps:
        if not isinstance(step, str) or not step.strip():
            raise UserError(f'{where}: "steps" must hold non-empty strings, not {step!r}')
    if not question.strip():
        raise UserError(f'{where}: "question" is empty; fill it in or remove the problem')
    if answer is not None and not answer.strip():
        raise UserError(f'{where}: "answer" is empty; fill it in or remove the problem')


def check_text(where, *texts):
    """Raise UserError if a text holds half a character, which no tokenizer can encode."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{where}: {e.object[e.start]!r} is half of a surrogate pair, not text; write the "
            "whole character in UTF-8 (in a terminal of another encoding set PYTHONUTF8=1)"
        ) from None


# ---- JSON ----------------------------------------------------------------------------------------


@contextmanager
def json_errors(where, hint):
    """Inside, invalid JSON raises UserError. hint: what may be wrong.

    So does JSON that Python cannot read: nested too deeply, or a number of thousands of digits.
    """
    try:
        yield
    except (ValueError, RecursionError) as e:
        # `where` is the position within the file, so take the reason alone (msg) from the error
        reason = getattr(e, "msg", e)
        raise UserError(f"{where}: is not valid JSON ({reason}); {hint}") from None


def unique_keys(pairs):
    """The dict of a JSON object. Raises ValueError if a key appears twice: which one is meant?"""
    record = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"{key!r} appears twice in one object")
        record[key] = value
    return record
