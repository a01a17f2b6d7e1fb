"""Problem files: JSON, JSONL and iCoT text."""
import json
import re
from pathlib import Path

from ..problems import Problem
from .errors import UserError


def read_problems(path, answers=True):
    """Problems of a file. Coconut's JSON list or JSONL of {"question", "steps", "answer"}, or iCoT's `question||steps #### answer`.

    answers False: an answer may be empty, and in JSON left away. Raises UserError with file, line and reason.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{path}:0: cannot be read ({e.strerror}); give a problem file")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}:0: is not UTF-8 text (byte {e.start}); give JSON, JSONL or iCoT text")
    if not text.strip():
        raise UserError(f"{path}:1: is empty; it needs at least one problem")
    if text.lstrip().startswith("["):
        return list(_json_list(path, text, answers))
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]  # U+2028 may stand inside a JSON string
    read = _json_line if lines[0][1].lstrip().startswith("{") else _icot_line
    return [read(f"{path}:{i}", line, answers) for i, line in lines]


def _json_list(path, text, answers):
    """Problems of a JSON list, one record at a time, so that an error knows the line that its record begins on."""
    decoder, blank = json.JSONDecoder(object_pairs_hook=_once), re.compile(r"[ \t\r\n]*")
    line, at = 1, 0

    def skip(to):  # over blanks from `to`
        nonlocal line, at
        end = blank.match(text, to).end()
        line, at = line + text.count("\n", at, end), end
        return text[at:at + 1]

    if skip(text.index("[") + 1) == "]":
        raise UserError(f"{path}:1: the list is empty; it needs at least one problem")
    while True:
        record, end = _json(f"{path}:{line}", lambda: decoder.raw_decode(text, at), "the file may be truncated")
        yield _record(f"{path}:{line}", record, answers)
        after = skip(end)
        if after == "]":
            break
        if after != ",":
            raise UserError(f"{path}:{line}: expected ',' or ']' after a problem; the file may be truncated")
        skip(at + 1)
    if skip(at + 1):
        raise UserError(f"{path}:{line}: text after the end of the list; give one list a file")


def _json_line(where, line, answers):
    return _record(where, _json(where, lambda: json.loads(line, object_pairs_hook=_once), "each line must be one object"), answers)


def _json(where, read, hint):
    """read(), a JSON value. Raises UserError where it is none, or one that Python refuses: nested too deep, a number too long."""
    try:
        return read()
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: is not valid JSON ({getattr(e, 'msg', e)}); {hint}")


def _once(pairs):
    """The object of a JSON object's pairs. Raises ValueError where a key comes twice: which one counts is anyone's guess."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))!r} stands twice in one object")
    return found


def _record(where, r, answers):
    if not isinstance(r, dict):
        raise UserError(f"{where}: a problem must be an object, not {type(r).__name__}; give question, steps and answer")
    if not answers:
        r = {"answer": "", **r}
    for key, kind, name in (("question", str, "a string"), ("steps", list, "a list of strings"), ("answer", str, "a string")):
        if key not in r:
            raise UserError(f'{where}: "{key}" is missing; a problem has question, steps and answer')
        if not isinstance(r[key], kind):
            raise UserError(f'{where}: "{key}" must be {name}, not {type(r[key]).__name__}')
    for step in r["steps"]:
        if not isinstance(step, str) or not step.strip():
            raise UserError(f'{where}: "steps" must hold non-empty strings, not {step!r}')
    for key in ("question", "answer")[: 1 + answers]:
        if not r[key].strip():
            raise UserError(f'{where}: "{key}" is empty; write it or leave the problem out')
    if any("### " in text for text in (*r["steps"], r["answer"])):
        raise UserError(f'{where}: a step or the answer holds "### ", which begins an answer; write it in another way')
    check_text(where, r["question"], *r["steps"], r["answer"])
    return Problem(r["question"].strip(), [s.strip() for s in r["steps"]], r["answer"].strip(), where)


def check_text(where, *texts):
    """Raises UserError where one holds half a character: what no tokenizer can read."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: {e.object[e.start]!r} is half of a surrogate pair and no text; write the whole character in UTF-8")


ICOT_STEP = re.compile("<<.*?>>")


def _icot_line(where, line, answers):
    question, bar, rest = line.partition("||")
    steps, hashes, answer = rest.partition("####")
    if not bar or not hashes or ICOT_STEP.sub("", steps).strip():
        raise UserError(f"{where}: is not `question||<<…>> <<…>> #### answer`; see README, Llama-3.2-1B and GSM8k-Aug")
    return _record(where, {"question": question, "steps": ICOT_STEP.findall(steps), "answer": answer}, answers)
