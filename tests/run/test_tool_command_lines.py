"""The command lines of sample.py, evaluate, probe and ablate: mistakes, and what ablate trains."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sample
from minatp.run import evaluate, options
from minatp.run.errors import UserError, guarded
from minatp.tools import ablate, probe

from runs import GOOD

# ---- sample.py -----------------------------------------------------------------------------------

SAME_CHAINS = ("--n", "2", "--temperature", "0")


# fmt: off
@pytest.mark.parametrize("argv, start, reason", [
    # Options
    (["--n", "0"], "command line: ", "--n must be positive"),
    (["Q", "--file", "x"], "command line: ", "not both"),
    (["--temperature", "-1"], "command line: ", "--temperature"),
    (["--temperature", "nan"], "command line: ", "--temperature"),
    (["--temperature", "1e-40"], "command line: ", "--temperature"),
    (["--temprature", "1"], "command line: ", "did you mean --temperature?"),
    (["--seed", 10**20, "Q"], "command line: ", "--seed"),
    (["--problems", "-1"], "command line: ", "--problems"),
    (["--problems", 10**9], "built-in test:0: ", "ask for 1,000,000 at most"),
    (["--vote", "loudest"], "command line: ", "--vote must be"),
    (["--vote", "majority", *SAME_CHAINS], "command line: ", "would all be the same"),
    ([*SAME_CHAINS, "Q"], "command line: ", "would all be the same"),

    # A question
    (["Q\udcff"], "command line:1: ", "half of a surrogate pair"),
    ([""], "command line:1: ", "contains no question"),
    (["word " * 900], "command line:1: ", "shorten it"),
    (["Q", "--max-new", "9999"], "command line:1: ", "lower --max-new"),

    # A file of questions or problems
    (["--file", "no.txt"], "no.txt:0: ", "cannot be read"),
    (["--file", "latin.txt"], "latin.txt:0: ", "cannot be read"),
    (["--file", "wide.txt"], "wide.txt:0: ", "cannot be read"),
    (["--file", "empty.txt"], "empty.txt:1: ", "contains no question"),
    (["--file", "long.txt"], "long.txt:2: ", "shorten it"),
    (["--file", "cut.json"], "cut.json:1: ", "is not valid JSON"),
    (["--file", "marked.json"], "marked.json:1: ", '"steps" is missing'),
])
# fmt: on
def test_sample_command_lines(argv, start, reason, finished, refused, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "wide.txt").write_text("One?\n", encoding="utf-16")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text("One?\n" + "word " * 900)
    (tmp_path / "cut.json").write_text(f"[{GOOD[:-5]}")
    # A byte order mark does not turn problems into questions
    (tmp_path / "marked.json").write_text('[{"question": "q"}]', encoding="utf-8-sig")
    refused(sample.main, ["--run", finished, *argv], start, reason)


def test_no_folder_given_to_sample(refused):
    refused(sample.main, ["--run", ",", "Q"], "command line: ", "--run names no folder")


def test_a_run_that_has_saved_nothing(tmp_path, refused):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.json").write_text("{}")
    refused(sample.main, ["--run", tmp_path, "q"], f"{tmp_path}:0: ", "has saved nothing yet")


# ---- evaluate and probe --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_probe_command_lines(seed, finished, refused):
    argv = [finished, "--problems", 10, "--seed", seed]
    refused(probe.main, argv, "command line: ", "--seed must not be negative")


@pytest.mark.parametrize(
    "option, value, reason",
    [
        ("--problems", -1, "must not be negative, not -1"),
        ("--votes", -2, "must not be negative, not -2"),
        ("--max-new", 0, "must be positive, not 0"),
        ("--temperature", 1e-7, "must be finite, and at least 1e-06, not 1e-07"),
        ("--temperature", "inf", "must be finite, and at least 1e-06, not inf"),
        ("--temperature", "nan", "must be finite, and at least 1e-06, not nan"),
        ("--seed", 2**32, "must not be negative or above 2^32 - 1, not 4294967296"),
    ],
)
def test_evaluate_command_lines(option, value, reason, finished, refused):
    refused(evaluate.main, [finished, option, value], "command line: ", f"{option} {reason}")


@pytest.mark.parametrize(
    "main, argv", [(evaluate.main, []), (probe.main, []), (sample.main, ["--run"])]
)
def test_tools_out_of_memory_exit_4(main, argv, finished, capsys, monkeypatch):
    def full(*args, **kwargs):
        return torch.empty(1 << 55, dtype=torch.uint8)

    monkeypatch.setattr(evaluate, "rollout", full)
    assert guarded(main, [*argv, str(finished), "--problems", "12", "--max-new", "4"]) == 4
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "out of memory with a batch of 12 ×" in err
    assert "lower --problems or --max-new" in err


def test_the_gain_on_one_problem_has_no_error(finished, tmp_path, capsys, recwarn):
    """A standard error needs two; a single one is no reason for a warning."""
    (tmp_path / "one").write_text(GOOD)
    argv = [finished, finished, "--file", tmp_path / "one", "--max-new", 4, "--json"]
    assert guarded(evaluate.main, [str(a) for a in argv]) == 0
    out, err = capsys.readouterr()
    second = json.loads(out.splitlines()[1])
    assert second["gain_se"] is None
    assert all(line.startswith("note: ") for line in err.splitlines())  # of answers cut off
    assert not recwarn


PUBLISHED = {
    "gsm8k.jsonl": {"question": "1 cup and 1 more?", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"},
    "gsmhard.jsonl": {"input": "1 cup and 1 more?", "target": 2.0},
    "svamp.json": [{"Body": "Ada has 1 cup.", "Question": "And 1 more?", "Answer": 2.0}],
    "multiarith.json": [{"sQuestion": "1 cup and 1 more?", "lSolutions": [2.0]}],
}


def test_published_sets_are_evaluated_by_one_command(finished, tmp_path, capsys):
    for name, content in PUBLISHED.items():
        (tmp_path / name).write_text(json.dumps(content))
    files = [str(tmp_path / name) for name in PUBLISHED]
    argv = [finished, "--file", ",".join(files), "--max-new", "4"]
    assert guarded(evaluate.main, [*map(str, argv), "--json"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["file"] for result in results] == files
    assert [result["n_problems"] for result in results] == [1, 1, 1, 1]


# ---- ablate --------------------------------------------------------------------------------------


# fmt: off
@pytest.mark.parametrize("argv, reason", [
    (["--arms", "magic"], "there is no 'magic'"),
    (["--seeds", "x"], "--seeds must be whole numbers"),
    (["--job", "2"], "did you mean --jobs?"),
    (["--jobs", "0"], "--jobs must be positive"),
    (["--seeds", "0,1,0"], "--seeds has the same number twice"),
    (["--seeds", "0,-1"], "--seeds must be from 0 to 4294967295"),
    (["--options", "--lr 1e-3 --seed=7"], "--options: --seed cannot be given here"),
    (["--options", "--data 'a b"], "--options: No closing quotation"),
    (["--options", "--K 3", "--arms", "CoT; iCoT"], "--epochs needs 1 or 5 numbers ≥ 0"),
])
# fmt: on
def test_ablate_command_lines(argv, reason, refused):
    refused(ablate.main, argv, "command line: ", reason)


@pytest.fixture
def trained(monkeypatch):
    """Names of the folders that ablate trains, in order. Nothing is trained: files are written."""
    names = []
    result = {
        "accuracy": 0.5,
        "accuracy_ci95": [0.4, 0.6],
        "coherence": None,
        "latents": 1,
        "answer_tokens": 1,
        "seconds": 1,
        "training_problems": 4,
    }

    def train(command, **kwargs):
        out = Path(command[command.index("--out") + 1])
        names.append(out.name)

        # A run that has saved nothing starts anew, and one that another starts from has ended
        assert "--resume" not in command
        if "--init" in command:
            start = Path(command[command.index("--init") + 1])
            assert (start / "summary.json").exists()

        cfg = options.parse(command[command.index("--stage") :], "")
        options.write_config(cfg, out / "config.json")
        records = [{"step": step, "stage": 5, "seconds": step} for step in (1, 2)]
        lines = [json.dumps(record) + "\n" for record in records]
        (out / "metrics.jsonl").write_text("".join(lines))
        (out / "summary.json").write_text(json.dumps(result))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablate.subprocess, "run", train)
    return names


# fmt: off
@pytest.mark.parametrize("arm, folders", [
    ("Coconut", ["Coconut.0"]),
    ("RL, leave one out", ["ATP.0", "RL--leave-one-out.0"]),
    ("ATP, β × 10, then RL", ["ATP--β---10.0", "ATP--β---10--then-RL.0"]),
    ("control: more SFT", ["ATP.0", "RL.0", "control--more-SFT.0"]),
])
# fmt: on
def test_ablate_trains_no_run_that_is_not_needed(arm, folders, trained, tmp_path):
    ablate.main(["--out", str(tmp_path), "--arms", arm])
    assert trained == folders


def test_ablate_trains_every_run_once_and_first_those_that_others_need(trained, tmp_path, capsys):
    # A run that was killed before it had saved anything
    (tmp_path / "ATP.0").mkdir()
    (tmp_path / "ATP.0" / "config.json").write_text("{}")

    arms = [
        "SFT on answers alone, then RL",
        "SFT on answers alone, twice",
        "ATP, β × 10, then RL",
    ]
    ablate.main(["--out", str(tmp_path), "--jobs", "2", "--arms", "; ".join(arms)])
    assert len(trained) == len(set(trained)) == 7
    assert set(trained[:2]) == {"ATP.0", "ATP--β---10.0"}
    assert trained[2:4] == ["RL.0", "SFT-on-answers-alone.0"]

    # What has ended is not trained again
    again = ["--out", str(tmp_path), "--arms", "SFT on answers alone"]
    ablate.main(again)
    assert len(trained) == 7
    cfg = options.of_run(tmp_path / "SFT-on-answers-alone.0" / "config.json")
    assert cfg.epochs.startswith("0,0,0,0,0,")

    # A run settles its dtype, which is another one only if it is asked for
    config = tmp_path / "ATP.0" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}))
    ablate.main(again)
    assert len(trained) == 7
    assert guarded(ablate.main, [*again, "--options", "--dtype bfloat16"]) == 2
    assert "ran with another --dtype" in capsys.readouterr().err

    # With other options it would be another run
    capsys.readouterr()
    assert guarded(ablate.main, [*again, "--options", "--lr 0.5"]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path}/ATP.0/config.json:1: ran with another --lr" in err

    # A damaged summary
    summary = tmp_path / "SFT-on-answers-alone.0" / "summary.json"
    summary.write_text(summary.read_text()[:20])
    assert guarded(ablate.main, again) == 2
    assert f"{summary}:1: is not valid JSON" in capsys.readouterr().err


def test_ablate_knows_its_runs_from_a_model_of_other_sizes(tmp_path):
    """A run writes the sizes that --init brings into its config.json."""
    arguments = ["--init", "a-model"]
    cfg = options.parse(arguments, "")
    cfg.n_layer, cfg.c = 3, 2
    options.write_config(cfg, tmp_path / "config.json")
    ablate.check_same_options(tmp_path, arguments)
    with pytest.raises(UserError, match="another --n-layer than"):
        ablate.check_same_options(tmp_path, [*arguments, "--n-layer", "4"])
