"""What can be wrong in the files and folders that users give.

Each case ends with exit code 2 and one line on stderr that names the file and the place.
"""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import sample
import train
from minatp.run import evaluate, options, splits
from minatp.run.errors import guarded
from minatp.run.folder import claim_folder
from minatp.run.huggingface import load_model
from minatp.run.loop import Run
from minatp.run.saved import checkpoints
from minatp.tools import probe

from runs import GOOD, MODEL, TINY, TINY_RL, facts, go

# ---- problem files -------------------------------------------------------------------------------

# (contents, line, reason)
# fmt: off
BAD_JSON_LISTS = [
    ("[]", 1, "the list is empty"),
    ("[\n{}]", 2, '"question" is missing'),
    (f"[{GOOD},\n\n 7]", 3, "must be an object, not int"),
    (f"[{GOOD},\n[]]", 2, "must be an object, not list"),
    (f"[{GOOD}\n", 2, "may be truncated"),
    (f"[{GOOD},\n", 2, "may be truncated"),
    (f"[\n{GOOD[:-9]}", 2, "may be truncated"),
    (f"[{GOOD}\n{GOOD}]", 2, "expected ',' or ']'"),
    (f"[{GOOD}] x", 1, "after the end of the list"),
    (f"[{GOOD}]\n[{GOOD}]", 2, "after the end of the list"),
    ("[" * 100_000, 1, "is not valid JSON"),
    (f'[{GOOD},\n{{"question": {"7" * 5000}}}]', 2, "is not valid JSON"),
    (
        f'[{GOOD},\n{{"question": "q", "question": "p", "steps": [], "answer": "2"}}]', 2,
        "'question' appears twice in one object",
    ),
]
BAD_JSON_LINES = [
    (f'{GOOD}\n{{"question": "q"', 2, "is not valid JSON"),
    (f"{GOOD}\n\n{GOOD[:-1]}", 3, "is not valid JSON"),
    (f'{GOOD}\n{{"question": {"7" * 5000}}}', 2, "is not valid JSON"),
    ('{"a":' * 100_000, 1, "is not valid JSON"),
    (f"{GOOD}\nq||<<1+1=2>> #### 2", 2, "each line must be one object"),
    (
        f'{GOOD}\n{{"question": "q", "answer": "1", "steps": [], "answer": "2"}}', 2,
        "'answer' appears twice in one object",
    ),
]
BAD_RECORDS = [
    ('{"question": "q", "steps": "s", "answer": "1"}', 1, '"steps" must be a list'),
    ('{"question": "q", "steps": [""], "answer": "1"}', 1, "non-empty strings"),
    ('{"question": "q", "steps": [3], "answer": "1"}', 1, "non-empty strings, not 3"),
    (
        '{"question": "q", "steps": null, "answer": "1"}', 1,
        '"steps" must be a list of strings, not NoneType',
    ),
    ('{"question": "q", "steps": [], "answer": 1}', 1, '"answer" must be a string, not int'),
    ('{"question": ["q"], "steps": [], "answer": "1"}', 1, '"question" must be a string, not list'),
    ('{"question": "q", "steps": []}', 1, '"answer" is missing'),
    ('{"question": " ", "steps": [], "answer": "1"}', 1, '"question" is empty'),
    (
        f'{GOOD}\n{{"question": "q\\ud800", "steps": [], "answer": "1"}}', 2,
        "half of a surrogate pair",
    ),
    (
        '{"question": "q", "steps": ["### 7"], "answer": "2"}', 1,
        'contains "### ", which begins an answer',
    ),
]
BAD_PUBLISHED_RECORDS = [
    (f'{GOOD}\n{{"question": "q", "answer": "<<1+1=2>>2 #### "}}', 2, '"answer" is empty'),
    ('{"question": "q", "answer": "<<1+1=2>>2"}', 1, '"steps" is missing'),
    ('{"answer": "<<1+1=2>>2 #### 2"}', 1, '"question" is missing'),
    (
        '{"input": "q", "code": ""}', 1,
        '"target" is missing; GSM-Hard has input and target',
    ),
    ('{"input": "q", "target": null}', 1, '"target" must be a number, not NoneType'),
    ('{"input": "q", "target": NaN}', 1, '"target" must be one number, not NaN'),
    ('{"input": "q", "target": 1e999}', 1, '"target" must be one number, not Infinity'),
    ('{"input": "q", "target": true}', 1, '"target" must be one number, not true'),
    (
        '{"Body": "b", "Answer": 1.0}', 1,
        '"Question" is missing; SVAMP has Body, Question and Answer',
    ),
    ('{"Body": 7, "Question": "q", "Answer": 1.0}', 1, '"Body" must be a string, not int'),
    ('[{"sQuestion": "q",\n"lSolutions": []}]', 1, '"lSolutions" must be one number, not []'),
    ('{"sQuestion": "q", "lSolutions": [1.0, 2.0]}', 1, "must be one number, not [1.0, 2.0]"),
    ('{"sQuestion": "q", "lSolutions": [[1.0]]}', 1, "must be one number, not [[1.0]]"),
    ('{"sQuestion": " ", "lSolutions": [1.0]}', 1, '"question" is empty'),
]
BAD_ICOT_LINES = [
    ("q||<<1+1=2>> #### 2\nno bars #### 3", 2, "is not `question||"),
    ("q||<<1+1=2>> 2", 1, "is not `question||"),
    ("q||Ann has <<1+1=2>>2 pens #### 2", 1, "is not `question||"),
    ("q||<<1+1=2>> #### ", 1, '"answer" is empty'),
    ("||<<1+1=2>> #### 2", 1, '"question" is empty'),
    ("q||<<1+1=2>> #### 2 #### 3", 1, 'contains "### ", which begins an answer'),
]
BAD_TEXTS = [
    ("", 1, "is empty"),
    ("\n \n", 1, "is empty"),
    (GOOD.encode("utf-16"), 0, "is not UTF-8 text (byte 0)"),
    (b"q||<<1+1=2>> #### 2\n\xff\xfe", 0, "is not UTF-8 text (byte 20)"),
    (b"PK\x03\x04\x99\x00", 0, "is not UTF-8 text"),
]
TOO_FEW_PROBLEMS = [
    (f"{GOOD}\n" * 3, 1, "has 3 problems, too few to hold out --val-size 4; give --val"),
    (
        '{"question": "a", "steps": [], "answer": "1"}\n' * 20, 1,
        "no problem with steps is left to learn from",
    ),
]
# fmt: on


@pytest.mark.parametrize(
    "contents, line, reason",
    [
        *BAD_JSON_LISTS,
        *BAD_JSON_LINES,
        *BAD_RECORDS,
        *BAD_PUBLISHED_RECORDS,
        *BAD_ICOT_LINES,
        *BAD_TEXTS,
        *TOO_FEW_PROBLEMS,
    ],
)
def test_problem_files(contents, line, reason, refused, tmp_path):
    if isinstance(contents, str):
        contents = contents.encode()
    (tmp_path / "bad").write_bytes(contents)
    refused(train.main, [*TINY, "--data", "bad"], f"bad:{line}: ", reason)


@pytest.mark.parametrize(
    "option, path, reason",
    [
        ("--data", "nowhere.json", "cannot be read (No such file or directory)"),
        ("--data", ".", "cannot be read (Is a directory)"),
        ("--val", "nowhere.json", "cannot be read"),
        ("--test", "nowhere.json", "cannot be read"),
    ],
)
def test_missing_problem_files(option, path, reason, refused, tmp_path):
    (tmp_path / "good").write_text(f"{GOOD}\n" * 9)
    refused(train.main, [*TINY, "--data", "good", option, path], f"{path}:0: ", reason)


def problems_with_a_long_one(question, n_word):
    """Four problems as JSONL; the second has n_word words."""
    lines = []
    for i in range(1, 5):
        words = " word" * (n_word if i == 2 else 1)
        problem = {"question": f"{question} {i}{words}", "steps": ["<<1+1=2>>"], "answer": "2"}
        lines.append(json.dumps(problem) + "\n")
    return "".join(lines)


@pytest.mark.parametrize("option", ["--data", "--val", "--test"])
def test_a_problem_longer_than_the_context_is_named_before_training(option, refused, tmp_path):
    argv = [*TINY, "--vocab-size", 300, "--block-size", 200, "--out", "run"]
    for name in ("--data", "--val", "--test"):
        n_word = 500 if name == option else 1
        (tmp_path / name).write_text(problems_with_a_long_one(f"a question of {name[2:]}", n_word))
        argv += [name, tmp_path / name]
    refused(train.main, argv, f"{tmp_path / option}:2: the problem is ", "shorten it")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "steps, sizes, reason",
    [
        ("<<1+1=2>> <<2+2=4>>", ("--block-size", 85), "the model's context is 85"),
        ("<<1+1=2>>", ("--block-size", 85, "--no-stop"), "context is 85"),
        ("<<1+1=2>> <<2+2=4>>", ("--block-size", 95), "tokens long but there is room for"),
    ],
)
def test_latents_count_towards_the_context(steps, sizes, reason, refused, tmp_path):
    """40 latents a step are too many for it, though the written problem would fit."""
    lines = [f"q{i}||{steps} #### 4\n" for i in range(9)]
    (tmp_path / "d").write_text("".join(lines))
    argv = [*TINY, "--data", "d", "--c", 40, "--vocab-size", 300, *sizes]
    refused(train.main, argv, "d:", reason)


# ---- training and held-out problems --------------------------------------------------------------


def icot_problems(first, n):
    lines = []
    for i in range(first, first + n):
        lines.append(f"q {i} and {i}||<<{i}+{i}={2 * i}>> #### {2 * i}\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """A folder with a run, `a`, that was trained on the file `d` and tested on the file `t`."""
    home = tmp_path_factory.mktemp("own")
    (home / "d").write_text(icot_problems(0, 40))
    (home / "t").write_text(icot_problems(900, 3))
    go(*TINY, "--data", home / "d", "--test", home / "t", "--out", home / "a")
    return home


def test_what_init_was_trained_on_cannot_be_held_out(own_data, refused):
    argv = [*TINY_RL, "--data", own_data / "d", "--init", own_data / "a", "--dry-run"]
    start = f"{own_data / 'a'}:0: "
    refused(train.main, argv, start, "was trained on 4 of the 8 questions that are held out here")
    argv += ["--test", own_data / "t"]
    refused(train.main, [*argv, "--val-size", 6], start, "was trained on 2 of the 9 questions")


def test_a_note_says_if_it_is_unknown_what_init_was_trained_on(own_data, capsys):
    argv = [*TINY_RL, "--data", own_data / "d", "--test", own_data / "t", "--dry-run"]
    go(*argv, "--init", own_data / "a")
    assert "unknown whether" not in capsys.readouterr().out

    shutil.copytree(own_data / "a", own_data / "moved")
    gone = own_data / "gone"
    edit_json("config.json", data=str(gone))(own_data / "moved")
    go(*argv, "--init", own_data / "moved")
    out = capsys.readouterr().out
    assert f"unknown whether {own_data / 'moved'} was trained on" in out
    assert f"held out here: {gone}:0: cannot be read" in out


def test_every_reason_is_given_why_it_is_unknown(own_data, tmp_path, capsys):
    """Of --init, and of the run that it started from."""
    for name, init in (("first", ""), ("second", str(tmp_path / "first"))):
        shutil.copytree(own_data / "a", tmp_path / name)
        edit_json("config.json", data=f"gone {name}", init=init)(tmp_path / name)
    argv = [*TINY_RL, "--data", own_data / "d", "--test", own_data / "t", "--dry-run"]
    go(*argv, "--init", tmp_path / "second")
    out = capsys.readouterr().out
    assert "gone first:0: cannot be read" in out
    assert "gone second:0: cannot be read" in out


def test_a_changed_file_has_no_known_test_set(own_data, refused, tmp_path, capsys):
    """Split again, its problems of training would be among those of the test."""
    shutil.copy(own_data / "d", tmp_path / "d")
    go(*TINY, "--data", tmp_path / "d", "--out", tmp_path / "b")
    assert guarded(evaluate.main, [str(tmp_path / "b")]) == 0
    with (tmp_path / "d").open("a") as f:
        f.write("one more||<<1+1=2>> #### 2\n")
    reason = f"the problems are not those with which {tmp_path / 'b'} began"
    refused(evaluate.main, [tmp_path / "b"], f"{tmp_path / 'd'}:1: ", reason)
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    refused(evaluate.main, [tmp_path / "b"], f"{tmp_path / 'd'}:1: ", reason)

    # Nor is it known what the run has learned
    _, why_unknown = splits.learned_questions(tmp_path / "b")
    assert reason in why_unknown


def test_a_model_that_is_apart_from_its_run(own_data, tmp_path, refused, capsys):
    """A link still leads to the run. Of a copy it is unknown what it has learned."""
    (tmp_path / "link").symlink_to(own_data / "a" / "final")
    shutil.copytree(own_data / "a" / "final", tmp_path / "copy")
    argv = [*TINY_RL, "--data", own_data / "d", "--dry-run", "--init"]
    reason = "was trained on 4 of the 8 questions that are held out here"
    refused(train.main, [*argv, tmp_path / "link"], f"{tmp_path / 'link'}:0: ", reason)

    why = f"{tmp_path / 'copy'} was taken out of its run's folder"
    go(*argv, tmp_path / "copy")
    assert f"questions held out here: {why}" in capsys.readouterr().out
    assert guarded(evaluate.main, [str(tmp_path / "copy"), "--problems", "1"]) == 0
    assert f"note: {why}, so the problems are those of the built-in" in capsys.readouterr().err


def test_a_run_that_has_learned_from_its_own_descendant(own_data, tmp_path):
    """`first` was trained again, from a run that had started from it."""
    for name, init in (("first", "second"), ("second", "first")):
        shutil.copytree(own_data / "a", tmp_path / name)
        edit_json("config.json", init=str(tmp_path / init))(tmp_path / name)
    questions, why_unknown = splits.learned_questions(tmp_path / "first")
    assert len(questions) == 36
    assert why_unknown == f"{tmp_path / 'first'} has been trained again since"

    edit_json("config.json", init="nowhere")(tmp_path / "first")
    assert splits.learned_questions(tmp_path / "first") == (questions, "nowhere is gone")


def test_a_run_measured_on_what_it_was_trained_on_gets_a_note(own_data, capsys):
    argv = [str(own_data / "a"), "--file", str(own_data / "d")]
    assert guarded(evaluate.main, argv) == 0
    err = capsys.readouterr().err
    assert f"note: {own_data / 'a'}: was trained on 36 of the 40 questions" in err
    assert guarded(evaluate.main, argv[:1]) == 0
    assert "was trained on" not in capsys.readouterr().err


RESPELLED = [
    ("Ann's jar holds 6 figs. How many?", "Ann’s jar holds 6 figs. How many?"),
    ("A “long” walk?", 'A "long"  walk?'),
    ("Bob has 7 eggs?", "bob has 7 eggs?\n"),
]


@pytest.fixture
def respelled(tmp_path):
    """A folder with the files `d`, to learn from, and `t`, which has three questions of `d`.

    They are spelled differently.
    """
    for name, spelling in (("d", 0), ("t", 1)):
        records = [
            {"question": pair[spelling], "steps": ["<<1+1=2>>"], "answer": "2"}
            for pair in RESPELLED
        ]
        if name == "d":
            for i in range(20):
                records.append({"question": f"q {i}?", "steps": ["<<1+2=3>>"], "answer": "3"})
        (tmp_path / name).write_text(json.dumps(records))
    return tmp_path


def test_another_spelling_of_a_test_question_is_left_out_of_training(respelled, capsys):
    go(*TINY, "--data", respelled / "d", "--test", respelled / "t", "--dry-run")
    assert "left out of training: 3 in the validation or test set" in capsys.readouterr().out


def test_init_may_not_have_learned_another_spelling_of_a_test_question(respelled, refused):
    go(*TINY, "--data", respelled / "d", "--out", respelled / "a")
    argv = [*TINY_RL, "--init", respelled / "a", "--data", respelled / "d", "--val-size", 1]
    learned = splits.learned_questions(respelled / "a")[0]
    tested = splits.questions_of(splits.read_problems(respelled / "t"))
    n = len(learned & tested)
    assert n > 0
    argv += ["--val", respelled / "t", "--test", respelled / "t", "--dry-run"]
    refused(train.main, argv, f"{respelled / 'a'}:0: ", f"was trained on {n} of the 3 questions")


def test_a_run_that_learned_another_spelling_goes_on_but_is_no_start(
    respelled, refused, monkeypatch, capsys
):
    """An older version compared questions letter by letter."""
    files = ["--data", respelled / "d", "--test", respelled / "t"]
    by_letter = partial(splits.split_files, form=str)
    with monkeypatch.context() as patch:
        patch.setattr(splits, "normal_form", str)
        patch.setattr(splits, "split_files", by_letter)
        go(*TINY, *files, "--out", respelled / "old")
        go(*TINY_RL, *files, "--init", respelled / "old", "--out", respelled / "rl")
    capsys.readouterr()

    in_training = "3 in training are in the validation or test set, in another spelling"
    for name in ("old", "rl"):
        before = facts(respelled / name)
        go("--resume", "--out", respelled / name)
        assert in_training in capsys.readouterr().out
        assert facts(respelled / name) == before

    argv = [*TINY_RL, *files, "--init", respelled / "old", "--dry-run"]
    refused(train.main, argv, f"{respelled / 'old'}:0: ", "was trained on 3 of the 7 questions")


def test_a_run_resumes_with_its_own_problems_wherever_they_are(own_data, refused, tmp_path):
    shutil.copytree(own_data / "a", tmp_path / "run")
    resume = ["--resume", "--out", "run"]

    # Not with others
    text = (own_data / "d").read_text().replace("q 7 and", "q 7 or")
    (tmp_path / "other").write_text(text)
    reason = "the problems are not those that this run started with"
    refused(train.main, [*resume, "--data", "other"], "other:0: ", reason)
    refused(train.main, [*resume, "--data", "other", "--dry-run"], "other:0: ", reason)
    refused(
        train.main,
        [*resume, "--init", "run"],
        "run/config.json:1: ",
        "the run was started without --init, not with --init run",
    )

    # With a copy of the file
    shutil.copy(own_data / "d", tmp_path / "moved")
    go(*resume, "--data", tmp_path / "moved", "--dry-run")
    go(*resume, "--data", tmp_path / "moved")


def test_training_problems_may_come_in_several_files(own_data, tmp_path, refused):
    (tmp_path / "e").write_text(icot_problems(500, 7))
    argv = [*TINY, "--val", own_data / "t", "--test", own_data / "t"]
    cfg = options.parse([*map(str, argv), "--data", f"{own_data / 'd'},{tmp_path / 'e'}"], "")
    trained = splits.load_splits(cfg).train
    assert {p.source.rpartition(":")[0] for p in trained} == {f"{own_data}/d", f"{tmp_path}/e"}
    assert len(trained) == 47

    # a mistake of all of them has no line, and one of a file names it
    few = [*TINY, "--data", f"{own_data / 'd'},{own_data / 't'}", "--val-size", 50, "--dry-run"]
    refused(train.main, few, "command line: --data: ", "has 43 problems, too few")
    for wrong in (f"{own_data / 'd'},", f"{own_data / 'd'},{own_data / 'd'}"):
        refused(train.main, [*argv, "--data", wrong], "command line: --data: ", "each file once")
    both = f"{own_data / 'd'},{tmp_path / 'gone'}"
    refused(train.main, [*argv, "--data", both, "--dry-run"], f"{tmp_path / 'gone'}:0: ", "read")


def test_a_run_is_measured_on_what_it_has_held_out(tmp_path, own_data):
    go(*TINY, "--data", own_data / "d", "--out", tmp_path / "run")
    cfg = options.of_run(tmp_path / "run" / "config.json")
    held_out = splits.load_splits(cfg).tests["held out"]
    assert held_out
    assert splits.test_set(tmp_path / "run") == held_out


def test_a_run_with_a_test_file_can_be_measured_without_its_training_file(tmp_path, own_data):
    shutil.copytree(own_data / "a", tmp_path / "a")
    edit_json("config.json", data="gone")(tmp_path / "a")
    assert len(splits.test_set(tmp_path / "a")) == 3


# ---- ways to damage a directory ------------------------------------------------------------------


def edit_json(name, **changes):
    """Change fields of a JSON file; None removes a field."""

    def damage(directory):
        fields = json.loads((directory / name).read_text()) | changes
        kept = {key: value for key, value in fields.items() if value is not None}
        (directory / name).write_text(json.dumps(kept))

    return damage


def overwrite(name, content):
    def damage(directory):
        (directory / name).write_bytes(content)

    return damage


def truncate(name):
    def damage(directory):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[:-100])

    return damage


def remove(name):
    def damage(directory):
        (directory / name).unlink()

    return damage


def set_tensor(name, value, file="model.safetensors"):
    """Replace or add a tensor; None removes it."""

    def damage(directory):
        tensors = load_file(directory / file)
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
        save_file(tensors, directory / file)

    return damage


def remove_latent_head(directory):
    file = directory / "minatp" / "heads.safetensors"
    tensors = load_file(file)
    kept = {name: t for name, t in tensors.items() if not name.startswith("latent")}
    assert len(kept) < len(tensors)
    save_file(kept, file)


def make_index(content):
    """Turn the model into a sharded one with this index."""

    def damage(directory):
        (directory / "model.safetensors").rename(directory / "a.safetensors")
        (directory / "model.safetensors.index.json").write_text(content)

    return damage


# ---- models --------------------------------------------------------------------------------------

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def edit_rope(parameters):
    """Write RoPE's parameters as transformers 5 does."""
    return edit_json(CONFIG, rope_scaling=None, rope_parameters=parameters)


# (damage, file, reason)
# fmt: off
BAD_CONFIGS = [
    (remove(CONFIG), f"{CONFIG}:0", "cannot be read"),
    (overwrite(CONFIG, b""), f"{CONFIG}:1", "is not valid JSON"),
    (overwrite(CONFIG, b'{\n"vocab_size": 3,\n'), f"{CONFIG}:3", "is not valid JSON"),
    (overwrite(CONFIG, b"\xff"), f"{CONFIG}:1", "is not valid JSON"),
    (overwrite(CONFIG, b"[1]"), f"{CONFIG}:1", "must be a JSON object, not list"),
    (overwrite(CONFIG, b"[" * 100_000), f"{CONFIG}:1", "is not valid JSON"),
    (edit_json(CONFIG, model_type="gpt2"), f"{CONFIG}:1", "only llama can be loaded"),
    (edit_json(CONFIG, attention_bias=True), f"{CONFIG}:1", '"attention_bias" is True'),
    (edit_json(CONFIG, hidden_act="gelu"), f"{CONFIG}:1", "only 'silu' is supported"),
    (edit_json(CONFIG, vocab_size=None), f"{CONFIG}:1", '"vocab_size" is missing'),
    (edit_json(CONFIG, vocab_size="many"), f"{CONFIG}:1", '"vocab_size" must be int'),
    (edit_json(CONFIG, hidden_size=True), f"{CONFIG}:1", '"hidden_size" must be int'),
    (edit_json(CONFIG, num_hidden_layers=0), f"{CONFIG}:1", '"num_hidden_layers" must be positive'),
    (
        edit_json(CONFIG, hidden_size=10**30), f"{CONFIG}:1",
        '"hidden_size" must be positive, and below 2^31',
    ),
    (
        edit_json(CONFIG, rms_norm_eps=10**400), f"{CONFIG}:1",
        '"rms_norm_eps" must be positive, and below 2^31',
    ),
    (
        edit_json(CONFIG, rope_theta=10**400), f"{CONFIG}:1",
        '"rope_theta" must be a positive number',
    ),
    (
        edit_json(CONFIG, rms_norm_eps=float("nan")), f"{CONFIG}:1",
        '"rms_norm_eps" must be positive',
    ),
    (edit_json(CONFIG, num_key_value_heads=3), f"{CONFIG}:1", "4 heads cannot share 3"),
    (edit_json(CONFIG, head_dim=15), f"{CONFIG}:1", "head_dim 15 is odd"),
    (edit_json(CONFIG, bos_token_id=99999), f"{CONFIG}:1", "outside the vocabulary"),
    (edit_json(CONFIG, eos_token_id=[]), f"{CONFIG}:1", '"eos_token_id" one or a list of them'),
    (
        edit_json(CONFIG, eos_token_id=["</s>"]), f"{CONFIG}:1",
        '"eos_token_id" one or a list of them',
    ),
    (edit_json(CONFIG, eos_token_id=None), f"{CONFIG}:1", '"eos_token_id" one or a list of them'),
    (
        edit_rope("yarn"), f"{CONFIG}:1",
        "must be an object, not 'yarn'",
    ),
    (
        edit_rope({"rope_type": "yarn"}), f"{CONFIG}:1",
        "RoPE of type 'yarn'",
    ),
    (
        edit_rope(LLAMA3), f"{CONFIG}:1",
        'needs a positive number "original_max_position_embeddings"',
    ),
    (
        edit_rope({"rope_theta": "big"}), f"{CONFIG}:1",
        '"rope_theta" must be a positive number',
    ),
    (
        edit_rope({"partial_rotary_factor": 0.5}), f"{CONFIG}:1",
        '"partial_rotary_factor" other than 1.0 is not supported',
    ),
    (
        edit_json(CONFIG, quantization_config={"quant_method": "fp8"}), f"{CONFIG}:1",
        "the weights are quantised; dequantise the model first",
    ),
]
BAD_WEIGHTS = [
    (remove(WEIGHTS), f"{WEIGHTS}:0", "cannot be read"),
    (overwrite(WEIGHTS, b""), f"{WEIGHTS}:0", "is not a complete safetensors file"),
    (
        overwrite(WEIGHTS, b"<html>404</html>"), f"{WEIGHTS}:0",
        "is not a complete safetensors file",
    ),
    (truncate(WEIGHTS), f"{WEIGHTS}:0", "is not a complete safetensors file"),
    (
        edit_json(CONFIG, intermediate_size=161), f"{WEIGHTS}:0",
        "has shape (160, 64), but the config asks for (161, 64)",
    ),
    (set_tensor(NORM, None), f"{WEIGHTS}:0", f"tensor {NORM} (64,) is missing"),
    (
        set_tensor("extra", torch.zeros(3)), f"{WEIGHTS}:0",
        "tensor extra (3,) is not part of this model",
    ),
    (set_tensor(NORM, torch.zeros(5)), f"{WEIGHTS}:0", f"{NORM} has shape (5,)"),
    (
        set_tensor(NORM, torch.full((64,), float("nan"))), f"{WEIGHTS}:0",
        f"tensor {NORM} holds NaN",
    ),
    (
        set_tensor(NORM, torch.ones(64).to(torch.float8_e4m3fn)), f"{WEIGHTS}:0",
        f"tensor {NORM} is of type F8_E4M3, not of 16, 32 or 64 bits in floating point; dequantise",
    ),
    (
        set_tensor(NORM, torch.ones(64, dtype=torch.int8)), f"{WEIGHTS}:0",
        f"tensor {NORM} is of type I8, not of 16, 32 or 64 bits in floating point; dequantise",
    ),
    (
        set_tensor("lm_head.weight", torch.ones(384, 64)), f"{WEIGHTS}:0",
        'lm_head.weight differs from model.embed_tokens.weight, but config.json has "tie_word',
    ),
    (
        set_tensor("_orig_mod." + NORM, torch.ones(64)), f"{WEIGHTS}:0",
        f"holds tensor {NORM} twice",
    ),
    (make_index("{"), f"{INDEX}:1", "is not valid JSON"),
    (make_index('{"weight_map": {}}'), f"{INDEX}:1", '"weight_map" must map'),
    (make_index(f'{{"weight_map": {{"{NORM}": 7}}}}'), f"{INDEX}:1", '"weight_map" must map'),
    (
        make_index(f'{{"weight_map": {{"{NORM}": "b.safetensors"}}}}'), "b.safetensors:0",
        "cannot be read",
    ),
]
BAD_TOKENIZERS = [
    (remove(TOKENIZER), f"{TOKENIZER}:0", "is missing"),
    (overwrite(TOKENIZER, b""), f"{TOKENIZER}:1", "is not a tokenizer"),
    (overwrite(TOKENIZER, b'{"model": {}}'), f"{TOKENIZER}:1", "is not a tokenizer"),
    (truncate(TOKENIZER), f"{TOKENIZER}:1", "is not a tokenizer"),
    (
        edit_json(CONFIG, vocab_size=380, bos_token_id=1, eos_token_id=2), f"{TOKENIZER}:1",
        "but the embedding has only 380 rows",
    ),
    (
        edit_json(TOKENIZER, added_tokens=[]), f"{TOKENIZER}:1",
        "has no token 384, which config.json calls bos or eos",
    ),
    (
        overwrite("tokenizer_config.json", b"{"), "tokenizer_config.json:1",
        "is not valid JSON",
    ),
]
# fmt: on


@pytest.mark.parametrize("damage, file, reason", [*BAD_CONFIGS, *BAD_WEIGHTS, *BAD_TOKENIZERS])
def test_hugging_face_directories(damage, file, reason, refused, tmp_path):
    shutil.copytree(MODEL, tmp_path / "hf")
    damage(tmp_path / "hf")
    refused(sample.main, ["--run", tmp_path / "hf", "Q?"], f"{tmp_path}/hf/{file}: ", reason)


SWITCHES = "minatp/config.json"
HEADS = "minatp/heads.safetensors"
DECODER = "minatp/decoder.safetensors"


@pytest.mark.parametrize(
    "damage, file, reason",
    [
        (edit_json(SWITCHES, c=0), f"{SWITCHES}:1", '"c" is 0'),
        (edit_json(SWITCHES, K="four"), f"{SWITCHES}:1", "\"K\" is 'four'"),
        (edit_json(SWITCHES, vae=None), f"{SWITCHES}:1", '"vae" is None'),
        (edit_json(SWITCHES, colour=1), f"{SWITCHES}:1", '"colour" is 1'),
        (edit_json(SWITCHES, decoder_layers=2), f"{DECODER}:0", "is missing"),
        (remove(HEADS), f"{HEADS}:0", "cannot be read"),
        (remove(DECODER), f"{DECODER}:0", "cannot be read"),
        (remove_latent_head, f"{HEADS}:0", "is missing"),
        (set_tensor("left.weight", torch.ones(2), HEADS), f"{HEADS}:0", "left is no part"),
    ],
)
def test_saved_models(damage, file, reason, finished, refused, tmp_path):
    shutil.copytree(finished / "final", tmp_path / "saved")
    damage(tmp_path / "saved")
    argv = [*TINY_RL, "--init", tmp_path / "saved", "--out", "rl"]
    refused(train.main, argv, f"{tmp_path}/saved/{file}: ", reason)


@pytest.mark.parametrize("command", [evaluate.main, probe.main], ids=["evaluate", "probe"])
def test_a_model_that_is_not_there_is_not_measured(command, refused):
    refused(command, ["nowhere"], "nowhere:0: ", "is not a directory")


def test_half_a_saved_model_is_not_measured(finished, refused, tmp_path):
    """Its heads would be untrained."""
    shutil.copytree(finished / "final", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "minatp")
    reason = "is missing, although manifest.json lists it"
    refused(evaluate.main, ["half"], "half/minatp:0: ", reason)


def test_a_published_model_is_measured_with_a_note(tmp_path, finished, capsys):
    shutil.copytree(finished / "final", tmp_path / "published")
    shutil.rmtree(tmp_path / "published" / "minatp")
    (tmp_path / "published" / "manifest.json").unlink()
    assert guarded(evaluate.main, [str(tmp_path / "published"), "--problems", "1"]) == 0
    assert "stop head and φ are untrained" in capsys.readouterr().err


def test_padding_and_truncation_of_a_tokenizer_file_are_ignored(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    backend = Tokenizer.from_file(str(MODEL / TOKENIZER))
    backend.enable_padding(length=50)
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "model" / TOKENIZER))

    text = "Ann has 5 pens. Ann buys 7."
    _, padding_tokenizer = load_model(tmp_path / "model")
    _, tokenizer = load_model(MODEL)
    assert padding_tokenizer.encode(text) == tokenizer.encode(text)


# ---- a run's folder ------------------------------------------------------------------------------


def remove_checkpoints(out):
    shutil.rmtree(out / "checkpoints")


def do_nothing(out):
    pass


# (damage, options, file, reason)
# fmt: off
METRICS = "metrics.jsonl"
NOT_A_RECORD = "is not a record with a step"
BAD_FOLDERS = [
    (remove(CONFIG), "", f"{CONFIG}:0", "is missing, so there is no run here"),
    (overwrite(CONFIG, b"{"), "", f"{CONFIG}:1", "is not the config.json of a run"),
    (overwrite(CONFIG, b"[]"), "", f"{CONFIG}:1", "is not the config.json of a run"),
    (edit_json(CONFIG, lr="fast"), "", f"{CONFIG}:1", "\"lr\" must be float, not 'fast'"),
    (edit_json(CONFIG, K=2.5), "", f"{CONFIG}:1", '"K" must be int, not 2.5'),
    (edit_json(CONFIG, lr=10**400), "", f"{CONFIG}:1", "int too large"),
    (
        edit_json(CONFIG, colour="red"), "", f"{CONFIG}:1",
        "unexpected keyword argument 'colour'",
    ),
    (
        edit_json(CONFIG, batch_size=-3), "", f"{CONFIG}:1",
        "--batch-size must be positive, not -3",
    ),
    (
        do_nothing, "--lr 7", f"{CONFIG}:1",
        "the run was started with --lr 0.002, not with --lr 7.0",
    ),
    (
        do_nothing, "--stage rl", f"{CONFIG}:1",
        "the run was started with --stage sft, not with --stage rl",
    ),
    (remove_checkpoints, "", "checkpoints:0", "holds no checkpoint to resume from"),
    (overwrite(METRICS, b'{"step": 1}\n{"st\n{"step": 2}\n'), "", f"{METRICS}:2", NOT_A_RECORD),
    (overwrite(METRICS, b'{"loss": 1}\n'), "", f"{METRICS}:1", NOT_A_RECORD),
    (overwrite(METRICS, b"[" * 100_000 + b"\n"), "", f"{METRICS}:1", NOT_A_RECORD),
    (overwrite(METRICS, b"7\n"), "", f"{METRICS}:1", NOT_A_RECORD),
]
# fmt: on


@pytest.mark.parametrize("damage, options, file, reason", BAD_FOLDERS)
def test_folders_to_resume_from(damage, options, file, reason, finished, refused, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run")
    argv = ["--resume", "--out", "run", *options.split()]
    refused(train.main, argv, f"run/{file}: ", reason)


def test_a_run_without_an_intact_checkpoint(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    for folder in checkpoints(tmp_path / "run"):
        (folder / WEIGHTS).unlink()
    go("--resume", "--out", tmp_path / "run", expect=2)
    *warnings, error = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert error == (
        f"{tmp_path}/run/checkpoints:0: no checkpoint is intact; start again in another --out"
    )


def test_half_a_last_line_of_metrics_is_what_a_crash_leaves(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    metrics = tmp_path / "run" / METRICS
    with metrics.open("a") as f:
        f.write('{"step": 16, "lo')
    go("--resume", "--out", tmp_path / "run")
    assert metrics.read_text() == (finished / METRICS).read_text()


def test_a_folder_that_holds_a_run_is_not_overwritten(finished, refused):
    argv = [*TINY, "--out", finished]
    refused(train.main, argv, f"{finished}:0: ", "already holds a run; add --resume")


@pytest.mark.parametrize("inside", ["checkpoints", "final/again"])
def test_a_folder_inside_a_run_is_no_place_for_another(finished, refused, inside):
    out = finished / inside
    refused(train.main, [*TINY, "--out", out], f"{out}:0: ", f"lies in the run {finished}")


def test_a_folder_that_is_not_a_runs_is_not_overwritten(finished, refused, tmp_path, capsys):
    shutil.copytree(finished / "final", tmp_path / "model")
    reason = "already holds a config.json that is not a run's; choose another --out"
    refused(train.main, [*TINY, "--out", "model"], "model:0: ", reason)
    shutil.copytree(finished / "final", tmp_path / "downloaded" / "final")
    refused(train.main, [*TINY, "--out", "downloaded"], "downloaded:0: ", "already holds a model")

    for file in ("config.json", "metrics.jsonl"):
        (tmp_path / "foreign").mkdir(exist_ok=True)
        (tmp_path / "foreign" / file).write_text('{"colour": 1}\n')
        refused(train.main, [*TINY, "--out", "foreign"], "foreign:0: ", f"already holds a {file}")
        (tmp_path / "foreign" / file).unlink()

    go(*TINY, "--out", "downloaded", "--dry-run")
    assert "the run itself would end here: downloaded:0: already" in capsys.readouterr().out


def test_a_run_whose_folder_is_moved_writes_into_no_other(tmp_path, monkeypatch, refused):
    """It ends; what it has saved before is whole, and continues where it is now."""
    save = Run.save

    def save_and_move(run, n_done):
        save(run, n_done)
        (tmp_path / "run").rename(tmp_path / "old")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "another's").touch()

    monkeypatch.setattr(Run, "save", save_and_move)
    refused(
        train.main, [*TINY, "--out", "run"], "run:0: ", "has been moved or removed while the run"
    )
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["another's"]
    monkeypatch.undo()
    go("--resume", "--out", tmp_path / "old")
    assert (tmp_path / "old" / "summary.json").exists()


@pytest.mark.parametrize(
    "out, reason",
    [
        ("file", "cannot be written (File exists)"),
        ("x" * 300, "cannot be written (File name too long)"),
        ("file/below", "cannot be written (Not a directory)"),
    ],
)
def test_paths_that_cannot_be_a_folder(out, reason, refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(train.main, [*TINY, "--out", out], f"{out}:0: ", reason)


def test_a_path_too_long_for_sample(refused):
    path = "x" * 300
    refused(sample.main, ["--run", path, "Q"], path, "cannot be used (File name too long)")


def test_one_process_at_a_time_writes_into_a_folder(refused, tmp_path):
    shared = tmp_path / "shared"
    cfg = options.parse(["--out", str(shared)], "")
    for _ in range(2):
        with claim_folder(cfg):
            assert shared.is_dir()
            argv = [*TINY, "--out", "shared"]
            refused(train.main, argv, "shared:0: ", "another process is writing into this folder")
            assert shared.is_dir()
        assert not shared.exists()  # nothing was written into it


def test_an_empty_folder_that_the_user_made_stays(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    argv = [*TINY, "--data", "nowhere", "--out", "mine"]
    refused(train.main, argv, "nowhere:0: ", "cannot be read")
    assert (tmp_path / "mine").is_dir()


def test_rl_needs_a_model_that_thinks_in_latents(refused, tmp_path):
    go(*TINY, "--method", "cot", "--out", tmp_path / "cot")
    for init in ("cot", MODEL):
        argv = [*TINY_RL, "--init", init, "--out", "rl"]
        reason = "start --stage rl from an SFT run of --method atp"
        refused(train.main, argv, f"{init}:0: ", reason)
