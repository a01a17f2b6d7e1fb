"""What users get wrong on the command line, and where what is told goes: one line on stderr, the exit code, and nothing lost."""
import errno
import io
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sample
import train
from minatp import ablate, checkpoint, config, evaluate, page, probe, run, sets
from runs import GOOD, MODEL, TINY, TINY_RL, go


# ---- where words go -----------------------------------------------------------------------------------------------------

def test_a_terminal_that_cannot_show_a_sign_shows_another(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", stdout)
    assert guarded(lambda argv: print("σ 1")) == 0 and stdout.buffer.getvalue() == b"? 1\n"


@pytest.mark.parametrize("error, code", [(BrokenPipeError(), 141), (OSError(errno.ENOSPC, "full"), 74)])
def test_training_goes_on_where_nobody_reads_and_others_end(error, code, monkeypatch, capsys):
    def write(text):
        raise error

    silent = []
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=write))
    for module in (config, run):
        monkeypatch.setattr(module, "silence", lambda: silent.append(1))
    with stop:
        print0("a line")
    assert silent == [1]
    assert guarded(lambda argv: print0("a line")) == code and len(silent) == 2
    assert capsys.readouterr().err.count("\n") == (code == 74)


def test_a_page_that_the_disk_has_no_room_for_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "p.html").write_text("old")
    monkeypatch.setattr(options.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(NotWritten):
        page.write(tmp_path / "p.html", [], [])
    assert (tmp_path / "p.html").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    (tmp_path / "link").symlink_to("p.html")
    page.write(tmp_path / "link", [], [])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "p.html").read_text() != "old"


# ---- command lines ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, reason", [
    ("--methd cot", "there is no option --methd; did you mean --method?"),
    ("--xyzzy 1", "there is no option --xyzzy; --help lists them"),
    ("extra", "there is no option extra"),
    ("--lr", "argument --lr: expected one argument"),
    ("--lr fast", "argument --lr: invalid float value: 'fast'"),
    ("--K 2.5", "argument --K: invalid int value: '2.5'"),
    ("--lr -1", "--lr must be positive"), ("--lr nan", "--lr must be"), ("--w-acc inf", "--w-acc must be a finite number"),
    ("--K 0", "--K must be positive"), ("--batch-size 0", "--batch-size must be positive"), ("--seed -1", "--seed must not be negative"),
    (f"--seed {10**20}", "--seed must be below 2^32"), (f"--n-layer {10**30}", "--n-layer must be below 2^32"),
    ("--vocab-size -5", "--vocab-size must be positive"), ("--rope-theta 0", "--rope-theta must be positive"),
    ("--c 200", "--c 200 × --K 4 latents do not fit --block-size 512"),
    ("--n-layer 1", "--decoder-layers 2 must be at most --n-layer 1"),
    ("--max-new 508", "--c 1 × --K 4 latents and --max-new 508 do not fit --block-size 512"), ("--micro-batch -2", "--micro-batch must not be negative"),
    ("--method sft", "--method must be one of"), ("--stage dream", "--stage must be"), ("--preset huge", "--preset must be one of"),
    ("--epochs 1,2", "--epochs needs 1 or 6 numbers"), ("--epochs x", "--epochs must be numbers"), ("--epochs nan", "--epochs needs"),
    ("--epochs 0", "--epochs needs"), ("--epochs inf", "--epochs needs"),
    ("--n-head 3", "--n-embd 128 must be an even multiple of --n-head 3"), ("--n-kv-head 3", "--n-head 4 must be a multiple"),
    ("--method cot --no-vae", "--no-vae contradicts --method cot"), ("--no-vae --no-stop --no-decoder", "is --method coconut"),
    ("--device tpu", "--device 'tpu'"), ("--device cuda:99", "--device cuda:99"), ("--device meta", "--device 'meta' is not supported"),
    ("--test x.json", "--test needs --data"), ("--val x.json", "--val needs --data"),
    ("--data a --test x/a,y/a", "two files of the same name"),
    ("--preset llama-1b", "--preset llama-1b needs --init"), ("--stage rl --G 1", "--G must be at least 2"),
    ("--answers-share 2", "--answers-share must be between 0 and 1"), ("--baseline best", "--baseline must be mean or rloo"),
    ("--stage rl --method cot", "takes the model of --init as it is"), ("--stage rl --no-stop", "takes the model of --init as it is"),
    ("--answers-share .5 --epochs 1,0,0,0,0,0", "none here"), ("--answers-share .5 --method cot", "none here"),
    ("--optimizer sgd", "--optimizer must be muon or adamw"), ("--estimator guess", "--estimator must be"), ("--coherence loose", "--coherence must be"),
])
def test_command_lines(argv, reason, refused, tmp_path):
    for name in ("a", "x/a", "y/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{GOOD}\n" * 9)
    refused(train.main, ["--labelled", 40, "--test-size", 5, "--val-size", 5, *argv.split()], "command line: ", reason)


@pytest.mark.parametrize("argv, start, reason", [
    (["--init", "nowhere"], "nowhere:0: ", "is not a directory"),
    (["--stage", "rl", "--init", "nowhere"], "nowhere:0: ", "is not a directory"),
    (["--resume", "--out", "nowhere"], "nowhere/config.json:0: ", "start without --resume"),
    (["--block-size", 20], "built-in labelled:1: ", "context is 20"),
    (["--labelled", 10**9], "built-in labelled:0: ", "ask for 1,000,000 at most"),
])
def test_command_lines_with_a_wrong_path(argv, start, reason, refused):
    refused(train.main, ["--labelled", 40, "--answers", 5, "--test-size", 5, "--val-size", 5, *argv], start, reason)


@pytest.mark.parametrize("n_inner", [40, 352])  # the latter is the preset's, which counts once it is given
@pytest.mark.parametrize("options", [TINY, TINY_RL])
def test_a_size_that_the_model_has_not(options, n_inner, finished, refused):
    refused(train.main, [*options, "--n-inner", n_inner, "--init", finished, "--out", "o"], "command line: ",
            f"--n-inner {n_inner} contradicts --init {finished}, which has 24")


@pytest.mark.parametrize("option", [("--c", 3), ("--K", 4)])
def test_rl_takes_the_latents_that_sft_has_settled(option, finished, refused):
    refused(train.main, [*TINY_RL, *option, "--init", finished, "--out", "o"], "command line: ",
            f"{option[0]} {option[1]} contradicts --init {finished}, which has")


def test_answers_alone_that_the_data_lacks(tmp_path, refused):
    (tmp_path / "a").write_text("".join(f"q{i}||<<1+1=2>> #### 2\n" for i in range(9)))
    refused(train.main, ["--data", tmp_path / "a", "--val-size", 2, "--answers-share", .5, "--out", "o"], f"{tmp_path / 'a'}:1: ", "without steps")


@pytest.mark.parametrize("option, has", [(("--c", 3), "--c 1"), (("--K", 1, "--epochs", 1), "--K 2")])
def test_sft_goes_on_with_the_latents_that_were_taught(option, has, finished, refused):
    refused(train.main, [*TINY, *option, "--init", finished, "--out", "o"], "command line: ", f"thinks with {has}, not {option[1]}; give {has}")


def test_what_init_lacks_is_told(finished, tmp_path, capsys):
    go(*TINY, "--method", "sim-cot", "--init", finished, "--out", tmp_path / "o", "--dry-run")
    assert f"note: --init {finished} has a stop head: it is left away" in capsys.readouterr().out


def test_the_test_set_of_a_run_is_that_of_its_saved_models(finished):
    wanted = test_set(finished)
    assert wanted and test_set(finished / "final") == test_set(checkpoint.checkpoints(finished)[0]) == wanted != test_set(MODEL)


def test_a_run_that_has_saved_nothing(tmp_path, refused):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.json").write_text("{}")
    refused(sample.main, ["--run", tmp_path, "q"], f"{tmp_path}:0: ", "has saved nothing yet")


def test_help_tells_every_option_and_what_it_is_where_it_is_not_given(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{options.flag(f.name)} " in shown for f in fields(options.Config))
    tiny, large = (options.parse(["--preset", name, "--init", "x"], "") for name in ("tiny", "llama-1b"))
    assert tiny.c != large.c and f"latents per reasoning step [{tiny.c}; llama-1b {large.c}]" in shown
    assert f"of weights, data order and noise [{tiny.seed}]" in shown
    for name in ("run", "data", "latents", "training", "rl", "evaluation and files"):
        assert f" {name}: --" in shown


@pytest.mark.parametrize("argv, start, reason", [
    (["--n", "0"], "command line: ", "--n must be positive"), (["Q", "--file", "x"], "command line: ", "not both"),
    (["--temperature", "-1"], "command line: ", "--temperature"), (["--temperature", "nan"], "command line: ", "--temperature"),
    (["--seed", 10**20, "Q"], "command line: ", "--seed"), (["--problems", "-1"], "command line: ", "--problems"),
    (["--vote", "loudest"], "command line: ", "--vote must be"),
    (["--vote", "majority", "--n", "2", "--temperature", "0"], "command line: ", "would be one and the same"),
    (["--temprature", "1"], "command line: ", "did you mean --temperature?"),
    (["Q\udcff"], "command line:1: ", "half of a surrogate pair"), ([""], "command line:1: ", "holds no question"),
    (["word " * 900], "command line:1: ", "shorten it"), (["Q", "--max-new", "9999"], "command line:1: ", "lower --max-new"),
    (["--file", "no.txt"], "no.txt:0: ", "cannot be read"), (["--file", "latin.txt"], "latin.txt:0: ", "cannot be read"),
    (["--file", "empty.txt"], "empty.txt:1: ", "holds no question"), (["--file", "long.txt"], "long.txt:2: ", "shorten it"),
    (["--file", "cut.json"], "cut.json:1: ", "is not valid JSON"),
    (["--file", "wide.txt"], "wide.txt:0: ", "cannot be read"), (["--file", "marked.json"], "marked.json:1: ", '"steps" is missing'),
    (["--n", 3, "--temperature", 0, "Q"], "command line: ", "would be one and the same"),
    (["--problems", 10**9], "built-in test:0: ", "ask for 1,000,000 at most"),
])
def test_sample_command_lines(argv, start, reason, finished, refused, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text("One?\n" + "word " * 900)
    (tmp_path / "wide.txt").write_text("One?\n", encoding="utf-16")
    (tmp_path / "marked.json").write_text('[{"question": "q"}]', encoding="utf-8-sig")  # a byte order mark does not make it a question
    (tmp_path / "cut.json").write_text(f"[{GOOD[:-5]}")
    refused(sample.main, ["--run", finished, *argv], start, reason)


@pytest.mark.parametrize("argv, reason", [
    (["--arms", "magic"], "there is no 'magic'"), (["--seeds", "x"], "--seeds must be whole numbers"),
    (["--job", "2"], "did you mean --jobs?"), (["--jobs", "0"], "--jobs must be positive"),
])
def test_ablate_command_lines(argv, reason, refused):
    refused(ablate.main, argv, "command line: ", reason)


def test_ablate_trains_every_run_once_and_those_first_that_others_need(tmp_path, monkeypatch, capsys):
    """A run that was killed before it had saved anything begins anew."""
    (tmp_path / "ATP.0").mkdir()
    (tmp_path / "ATP.0" / "config.json").write_text("{}")
    asked = []

    def trained(command, **how):
        out = Path(command[command.index("--out") + 1])
        started = command[command.index("--init") + 1] if "--init" in command else None
        assert "--resume" not in command and (started is None or (Path(started) / "summary.json").exists())
        asked.append(out.name)
        given = options.parse(command[command.index("--stage"):], "")
        options.write_config(given, out / "config.json")
        (out / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "stage": 5, "seconds": i}) + "\n" for i in (1, 2)))
        (out / "summary.json").write_text(json.dumps({"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "coherence": None, "latents": 1, "answer_tokens": 1,
                                                      "seconds": 1, "training_problems": 4}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablate.subprocess, "run", trained)
    ablate.main(["--out", str(tmp_path), "--jobs", "2", "--arms", "SFT on answers alone, then RL; SFT on answers alone, twice; ATP, β × 10, then RL"])
    assert len(asked) == len(set(asked)) == 7 and set(asked[:2]) == {"ATP.0", "ATP--β---10.0"} and asked[2:4] == ["RL.0", "SFT-on-answers-alone.0"]
    again = ["--out", str(tmp_path), "--arms", "SFT on answers alone"]
    ablate.main(again)
    assert len(asked) == 7 and options.of_run(tmp_path / "SFT-on-answers-alone.0" / "config.json").epochs.startswith("0,0,0,0,0,")
    assert guarded(ablate.main, [*again, "--options", "--lr 0.5"]) == 2
    assert f"{tmp_path}/ATP.0/config.json:1: ran with another --lr" in capsys.readouterr().err


def test_no_folder_given_to_sample(refused):
    refused(sample.main, ["--run", ",", "Q"], "command line: ", "--run names no folder")


def test_another_seed_shows_other_problems_at_once(finished):
    """The largest seed, too."""
    shown = [[p.question for p in sample.sets.test_set(finished, 4, seed)] for seed in (0, 1, 2**32 - 1)]
    assert shown[0] == [p.question for p in sample.sets.test_set(finished)][:4] and not set(shown[0]) & set(shown[1]) & set(shown[2])


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_probe_command_lines(seed, finished, refused):
    refused(probe.main, [finished, "--problems", 10, "--seed", seed], "command line: ", "--seed must not be negative")


@pytest.mark.parametrize("main, argv", [(evaluate.main, []), (probe.main, []), (sample.main, ["--run"])])
def test_tools_out_of_memory_exit_4(main, argv, finished, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "rollout", lambda *a, **k: torch.empty(1 << 55, dtype=torch.uint8))
    assert guarded(main, [*argv, str(finished), "--problems", "12", "--max-new", "4"]) == 4
    err = capsys.readouterr().err
    assert "out of memory with a batch of 12 ×" in err and "lower --problems or --max-new" in err and err.count("\n") == 1


def test_the_gain_on_one_problem_has_no_error(finished, tmp_path, capsys, recwarn):
    (tmp_path / "one").write_text(GOOD)
    assert guarded(evaluate.main, [str(finished), str(finished), "--file", str(tmp_path / "one"), "--max-new", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[1])["gain_se"] is None and not err and not recwarn
