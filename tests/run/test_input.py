"""What is wrong in files and folders that users give: exit code 2 and one line on stderr that names the file and the place."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import sample
import train
from minatp import checkpoint, config, folder, sets
from runs import GOOD, MODEL, TINY, TINY_RL, go


# ---- problems -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, line, reason", [
    ("", 1, "is empty"),
    ("\n \n", 1, "is empty"),
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
    (f'{GOOD}\n{{"question": "q"', 2, "is not valid JSON"),
    (f"{GOOD}\n\n{GOOD[:-1]}", 3, "is not valid JSON"),
    (f'{GOOD}\n{{"question": {"7" * 5000}}}', 2, "is not valid JSON"),
    ('{"a":' * 100_000, 1, "is not valid JSON"),
    (f"{GOOD}\nq||<<1+1=2>> #### 2", 2, "each line must be one object"),
    ('{"question": "q", "steps": "s", "answer": "1"}', 1, '"steps" must be a list'),
    ('{"question": "q", "steps": [""], "answer": "1"}', 1, "non-empty strings"),
    ('{"question": "q", "steps": [3], "answer": "1"}', 1, "non-empty strings, not 3"),
    ('{"question": "q", "steps": null, "answer": "1"}', 1, '"steps" must be a list of strings, not NoneType'),
    ('{"question": "q", "steps": [], "answer": 1}', 1, '"answer" must be a string, not int'),
    ('{"question": ["q"], "steps": [], "answer": "1"}', 1, '"question" must be a string, not list'),
    ('{"question": "q", "steps": []}', 1, '"answer" is missing'),
    ('{"question": " ", "steps": [], "answer": "1"}', 1, '"question" is empty'),
    (f'{GOOD}\n{{"question": "q\\ud800", "steps": [], "answer": "1"}}', 2, "half of a surrogate pair"),
    ("q||<<1+1=2>> #### 2\nno bars #### 3", 2, "is not `question||"),
    ("q||<<1+1=2>> 2", 1, "is not `question||"),
    ("q||Ann has <<1+1=2>>2 pens #### 2", 1, "is not `question||"),
    ("q||<<1+1=2>> #### ", 1, '"answer" is empty'),
    ("||<<1+1=2>> #### 2", 1, '"question" is empty'),
    ("q||<<1+1=2>> #### 2 #### 3", 1, 'holds "### ", which begins an answer'),
    ('{"question": "q", "steps": ["### 7"], "answer": "2"}', 1, 'holds "### ", which begins an answer'),
    (f'{GOOD}\n{{"question": "q", "answer": "1", "steps": [], "answer": "2"}}', 2, "'answer' stands twice in one object"),
    (f'[{GOOD},\n{{"question": "q", "question": "p", "steps": [], "answer": "2"}}]', 2, "'question' stands twice in one object"),
    (GOOD.encode("utf-16"), 0, "is not UTF-8 text (byte 0)"),
    (b"q||<<1+1=2>> #### 2\n\xff\xfe", 0, "is not UTF-8 text (byte 20)"),
    (b"PK\x03\x04\x99\x00", 0, "is not UTF-8 text"),
    (f"{GOOD}\n" * 3, 1, "has 3 problems, too few to hold out --val-size 4"),
    ('{"question": "a", "steps": [], "answer": "1"}\n' * 20, 1, "no problem with steps is left to learn from"),
])
def test_problem_files(text, line, reason, refused, tmp_path):
    (tmp_path / "bad").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(train.main, [*TINY, "--data", "bad"], f"bad:{line}: ", reason)


@pytest.mark.parametrize("option, path, reason", [
    ("--data", "nowhere.json", "cannot be read (No such file or directory)"), ("--data", ".", "cannot be read (Is a directory)"),
    ("--val", "nowhere.json", "cannot be read"), ("--test", "nowhere.json", "cannot be read"),
])
def test_missing_problem_files(option, path, reason, refused, tmp_path):
    (tmp_path / "good").write_text(f"{GOOD}\n" * 9)
    refused(train.main, [*TINY, "--data", "good", option, path], f"{path}:0: ", reason)


@pytest.mark.parametrize("option", ["--data", "--val", "--test"])
def test_a_problem_longer_than_the_context_is_named_before_the_training(option, refused, tmp_path):
    for name, question in (("--data", "a"), ("--val", "b"), ("--test", "c")):
        words = "word " * 500 if name == option else "word"
        lines = "".join(json.dumps({"question": f"{question} {i} {words if i == 2 else ''}", "steps": ["<<1+1=2>>"], "answer": "2"}) + "\n"
                        for i in range(1, 5))
        (tmp_path / name).write_text(lines)
    files = [a for name in ("--data", "--val", "--test") for a in (name, tmp_path / name)]
    sizes = ("--vocab-size", 300, "--block-size", 200)
    refused(train.main, [*TINY, *files, *sizes, "--out", "run"], f"{tmp_path / option}:2: is ", "shorten it")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_chain_longer_than_the_context_is_named_though_its_words_are_not(refused, tmp_path):
    (tmp_path / "d").write_text("".join(f"q{i}||<<1+1=2>> <<2+2=4>> #### 4\n" for i in range(9)))
    refused(train.main, [*TINY, "--data", "d", "--c", 40, "--block-size", 85, "--vocab-size", 300], "d:", "the model's context is 85")
    (tmp_path / "s").write_text("".join(f"q{i}||<<1+1=2>> #### 2\n" for i in range(9)))
    refused(train.main, [*TINY, "--data", "s", "--c", 40, "--block-size", 85, "--vocab-size", 300, "--no-stop"], "s:", "context is 85")
    refused(train.main, [*TINY, "--data", "d", "--c", 40, "--block-size", 95, "--vocab-size", 300], "d:", "tokens long and there is room for")


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """A folder with a run, `a`, on a file of one's own, `d`, tested on others, `t`."""
    home = tmp_path_factory.mktemp("own")
    for name, first, n in (("d", 0, 40), ("t", 900, 3)):
        (home / name).write_text("".join(f"q {i} and {i}||<<{i}+{i}={2 * i}>> #### {2 * i}\n" for i in range(first, first + n)))
    go(*TINY, "--data", home / "d", "--test", home / "t", "--out", home / "a")
    return home


def test_what_a_run_has_learned_from_is_not_held_out_later(own_data, refused, capsys):
    again = [*TINY_RL, "--data", own_data / "d", "--init", own_data / "a", "--out", own_data / "b", "--dry-run"]
    refused(train.main, again, f"{own_data / 'a'}:0: ", "has learned from 4 of the 8 questions that are held out here")
    refused(train.main, [*again, "--test", own_data / "t", "--val-size", 6], f"{own_data / 'a'}:0: ", "has learned from 2 of the 9 questions")
    go(*again, "--test", own_data / "t")
    assert "cannot be told" not in capsys.readouterr().out
    shutil.copytree(own_data / "a", own_data / "moved")
    edit("config.json", data=str(own_data / "gone"))(own_data / "moved")
    go(*again[:-5], "--init", own_data / "moved", *again[-3:])
    assert f"cannot be told: {own_data / 'gone'}:0: cannot be read" in capsys.readouterr().out


def test_a_run_goes_on_with_its_own_problems_wherever_they_lie(own_data, refused, capsys, tmp_path):
    shutil.copytree(own_data / "a", tmp_path / "run")
    (tmp_path / "other").write_text((own_data / "d").read_text().replace("q 7 and", "q 7 or"))
    refused(train.main, ["--resume", "--out", "run", "--data", "other"], "other:0: ", "the problems are not those that this run began with")
    shutil.copy(own_data / "d", tmp_path / "moved")
    refused(train.main, ["--resume", "--out", "run", "--data", "other", "--dry-run"], "other:0: ", "the problems are not those")
    refused(train.main, ["--resume", "--out", "run", "--init", "run"], "run/config.json:1: ", "the run has --init , not run")
    go("--resume", "--out", tmp_path / "run", "--data", tmp_path / "moved", "--dry-run")
    go("--resume", "--out", tmp_path / "run", "--data", tmp_path / "moved")


def test_a_run_is_measured_on_what_it_held_out(tmp_path, own_data):
    go(*TINY, "--data", own_data / "d", "--out", tmp_path / "run")
    cfg = options.of_run(tmp_path / "run" / "config.json")
    assert test_set(tmp_path / "run") == load_splits(cfg).tests["held out"] != []
    shutil.copytree(own_data / "a", tmp_path / "a")
    edit("config.json", data="gone")(tmp_path / "a")
    assert len(test_set(tmp_path / "a")) == 3  # its test file is enough


# ---- models -------------------------------------------------------------------------------------------------------------

def edit(name, **changes):
    """Change a JSON file of a directory; None leaves a name out."""
    def change(directory):
        old = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({k: v for k, v in {**old, **changes}.items() if v is not None}))
    return change


def text(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def tensors(change, name="model.safetensors"):
    def rewrite(directory):
        found = load_file(directory / name)
        change(found)
        save_file(found, directory / name)
    return rewrite


def cut(name):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-100])


def without(name):
    return lambda directory: (directory / name).unlink()


def index(content):
    """A sharded model whose index holds `content`."""
    def change(directory):
        (directory / "model.safetensors").rename(directory / "a.safetensors")
        (directory / "model.safetensors.index.json").write_text(content)
    return change


CONFIG, WEIGHTS, TOKENIZER, INDEX = "config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("harm, file, reason", [
    (without(CONFIG), f"{CONFIG}:0", "cannot be read"),
    (text(CONFIG, b""), f"{CONFIG}:1", "is not valid JSON"),
    (text(CONFIG, b'{\n"vocab_size": 3,\n'), f"{CONFIG}:3", "is not valid JSON"),
    (text(CONFIG, b"\xff"), f"{CONFIG}:1", "is not valid JSON"),
    (text(CONFIG, b"[1]"), f"{CONFIG}:1", "must be a JSON object, not list"),
    (text(CONFIG, b"[" * 100_000), f"{CONFIG}:1", "is not valid JSON"),
    (edit(CONFIG, model_type="gpt2"), f"{CONFIG}:1", "only llama can be loaded"),
    (edit(CONFIG, attention_bias=True), f"{CONFIG}:1", '"attention_bias" is True'),
    (edit(CONFIG, hidden_act="gelu"), f"{CONFIG}:1", "only 'silu' is supported"),
    (edit(CONFIG, vocab_size=None), f"{CONFIG}:1", '"vocab_size" is missing'),
    (edit(CONFIG, vocab_size="many"), f"{CONFIG}:1", '"vocab_size" must be int'),
    (edit(CONFIG, hidden_size=True), f"{CONFIG}:1", '"hidden_size" must be int'),
    (edit(CONFIG, num_hidden_layers=0), f"{CONFIG}:1", '"num_hidden_layers" must be positive'),
    (edit(CONFIG, hidden_size=10**30), f"{CONFIG}:1", '"hidden_size" must be positive, and below 2^31'),
    (edit(CONFIG, rms_norm_eps=10**400), f"{CONFIG}:1", '"rms_norm_eps" must be positive, and below 2^31'),
    (edit(CONFIG, rope_theta=10**400), f"{CONFIG}:1", '"rope_theta" must be a positive number'),
    (edit(CONFIG, rms_norm_eps=float("nan")), f"{CONFIG}:1", '"rms_norm_eps" must be positive'),
    (edit(CONFIG, num_key_value_heads=3), f"{CONFIG}:1", "4 heads cannot share 3"),
    (edit(CONFIG, head_dim=15), f"{CONFIG}:1", "head_dim 15 is odd"),
    (edit(CONFIG, bos_token_id=99999), f"{CONFIG}:1", "outside the vocabulary"),
    (edit(CONFIG, eos_token_id=[]), f"{CONFIG}:1", '"eos_token_id" one or a list of them'),
    (edit(CONFIG, eos_token_id=["</s>"]), f"{CONFIG}:1", '"eos_token_id" one or a list of them'),
    (edit(CONFIG, eos_token_id=None), f"{CONFIG}:1", '"eos_token_id" one or a list of them'),
    (edit(CONFIG, rope_parameters="yarn"), f"{CONFIG}:1", "must be an object, not 'yarn'"),
    (edit(CONFIG, rope_parameters={"rope_type": "yarn"}), f"{CONFIG}:1", "RoPE of type 'yarn'"),
    (edit(CONFIG, rope_parameters=LLAMA3), f"{CONFIG}:1", 'lacks a positive number "original_max_position_embeddings"'),
    (edit(CONFIG, rope_parameters={"rope_theta": "big"}), f"{CONFIG}:1", '"rope_theta" must be a positive number'),
    (without(WEIGHTS), f"{WEIGHTS}:0", "cannot be read"),
    (text(WEIGHTS, b""), f"{WEIGHTS}:0", "is not a whole safetensors file"),
    (text(WEIGHTS, b"<html>404</html>"), f"{WEIGHTS}:0", "is not a whole safetensors file"),
    (cut(WEIGHTS), f"{WEIGHTS}:0", "is not a whole safetensors file"),
    (edit(CONFIG, intermediate_size=161), f"{WEIGHTS}:0", "has shape (160, 64), but the config asks for (161, 64)"),
    (tensors(lambda t: t.pop("model.norm.weight")), f"{WEIGHTS}:0", "tensor model.norm.weight (64,) is missing"),
    (tensors(lambda t: t.update(extra=torch.zeros(3))), f"{WEIGHTS}:0", "tensor extra (3,) is not one of this model's"),
    (tensors(lambda t: t.update({"model.norm.weight": torch.zeros(5)})), f"{WEIGHTS}:0", "model.norm.weight has shape (5,)"),
    (tensors(lambda t: t["model.norm.weight"].fill_(float("nan"))), f"{WEIGHTS}:0", "tensor model.norm.weight holds NaN"),
    (index("{"), f"{INDEX}:1", "is not valid JSON"),
    (index('{"weight_map": {}}'), f"{INDEX}:1", '"weight_map" must map'),
    (index('{"weight_map": {"model.norm.weight": 7}}'), f"{INDEX}:1", '"weight_map" must map'),
    (index('{"weight_map": {"model.norm.weight": "b.safetensors"}}'), "b.safetensors:0", "cannot be read"),
    (without(TOKENIZER), f"{TOKENIZER}:0", "is missing"),
    (text(TOKENIZER, b""), f"{TOKENIZER}:1", "is not a tokenizer"),
    (text(TOKENIZER, b'{"model": {}}'), f"{TOKENIZER}:1", "is not a tokenizer"),
    (cut(TOKENIZER), f"{TOKENIZER}:1", "is not a tokenizer"),
    (edit(CONFIG, vocab_size=380, bos_token_id=1, eos_token_id=2), f"{TOKENIZER}:1", "but the embedding has only 380 rows"),
    (edit(TOKENIZER, added_tokens=[]), f"{TOKENIZER}:1", "has no token 384, which config.json calls bos or eos"),
])
def test_hugging_face_directories(harm, file, reason, refused, tmp_path):
    shutil.copytree(MODEL, tmp_path / "hf")
    harm(tmp_path / "hf")
    refused(sample.main, ["--run", tmp_path / "hf", "Q?"], f"{tmp_path}/hf/{file}: ", reason)


@pytest.mark.parametrize("harm, file, reason", [
    (edit("minatp/config.json", c=0), "minatp/config.json:1", '"c" is 0'),
    (edit("minatp/config.json", K="four"), "minatp/config.json:1", "\"K\" is 'four'"),
    (edit("minatp/config.json", vae=None), "minatp/config.json:1", '"vae" is None'),
    (edit("minatp/config.json", colour=1), "minatp/config.json:1", '"colour" is 1'),
    (edit("minatp/config.json", decoder_layers=2), "minatp/decoder.safetensors:0", "is missing"),
    (without("minatp/heads.safetensors"), "minatp/heads.safetensors:0", "cannot be read"),
    (without("minatp/decoder.safetensors"), "minatp/decoder.safetensors:0", "cannot be read"),
    (tensors(lambda t: [t.pop(k) for k in list(t) if k.startswith("latent")], "minatp/heads.safetensors"), "minatp/heads.safetensors:0",
     "is missing"),
])
def test_saved_models(harm, file, reason, finished, refused, tmp_path):
    shutil.copytree(finished / "final", tmp_path / "saved")
    harm(tmp_path / "saved")
    refused(train.main, [*TINY_RL, "--init", tmp_path / "saved", "--out", "rl"], f"{tmp_path}/saved/{file}: ", reason)


# ---- a run's folder -----------------------------------------------------------------------------------------------------

def all_checkpoints(harm):
    return lambda out: [harm(c) for c in checkpoint.checkpoints(out)]


@pytest.mark.parametrize("harm, options, file, reason", [
    (without("config.json"), "", "config.json:0", "is missing, so no run is here"),
    (text("config.json", b"{"), "", "config.json:1", "is not the config.json of a run"),
    (text("config.json", b"[]"), "", "config.json:1", "is not the config.json of a run"),
    (edit("config.json", lr="fast"), "", "config.json:1", "\"lr\" must be float, not 'fast'"),
    (edit("config.json", K=2.5), "", "config.json:1", '"K" must be int, not 2.5'),
    (edit("config.json", lr=10**400), "", "config.json:1", "int too large"),
    (edit("config.json", colour="red"), "", "config.json:1", "unexpected keyword argument 'colour'"),
    (edit("config.json", batch_size=-3), "", "config.json:1", "--batch-size must be positive, not -3"),
    (lambda out: None, "--lr 7", "config.json:1", "the run has --lr 0.002, not 7.0"),
    (lambda out: None, "--stage rl", "config.json:1", "the run has --stage sft, not rl"),
    (lambda out: shutil.rmtree(out / "checkpoints"), "", "checkpoints:0", "holds no checkpoint to resume from"),
    (text("metrics.jsonl", b'{"step": 1}\n{"st\n{"step": 2}\n'), "", "metrics.jsonl:2", "is not a record with a step"),
    (text("metrics.jsonl", b'{"loss": 1}\n'), "", "metrics.jsonl:1", "is not a record with a step"),
    (text("metrics.jsonl", b"[" * 100_000 + b"\n"), "", "metrics.jsonl:1", "is not a record with a step"),
    (text("metrics.jsonl", b"7\n"), "", "metrics.jsonl:1", "is not a record with a step"),
])
def test_folders_to_resume_from(harm, options, file, reason, finished, refused, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    harm(tmp_path / "run")
    refused(train.main, ["--resume", "--out", "run", *options.split()], f"run/{file}: ", reason)


def test_a_run_of_which_no_checkpoint_is_whole(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    all_checkpoints(without("model.safetensors"))(tmp_path / "run")
    go("--resume", "--out", tmp_path / "run", expect=2)
    *warnings, error = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and error == f"{tmp_path}/run/checkpoints:0: no checkpoint is whole; start anew in another --out"


def test_half_a_last_line_of_metrics_is_what_a_crash_leaves(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 16, "lo')
    go("--resume", "--out", tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()


def test_folders_that_cannot_be_used(finished, refused, tmp_path):
    refused(train.main, [*TINY, "--out", finished], f"{finished}:0: ", "holds a run already; add --resume")
    (tmp_path / "file").write_text("")
    refused(train.main, [*TINY, "--out", "file"], "file:0: ", "cannot be written (File exists)")
    refused(train.main, [*TINY, "--out", "x" * 300], "x" * 300, "cannot be written (File name too long)")
    refused(sample.main, ["--run", "x" * 300, "Q"], "x" * 300, "cannot be used (File name too long)")
    refused(train.main, [*TINY, "--out", "file/below"], "file/below:0: ", "cannot be written (Not a directory)")
    cfg = options.parse(["--out", "shared"], "")
    for _ in range(2):
        with folder.claim(cfg):
            assert Path("shared").is_dir()
            refused(train.main, [*TINY, "--out", "shared"], "shared:0: ", "another process is writing into this folder")
            assert Path("shared").is_dir()
        assert not Path("shared").exists()
    Path("mine").mkdir()
    refused(train.main, [*TINY, "--data", "nowhere", "--out", "mine"], "nowhere:0: ", "cannot be read")
    assert Path("mine").is_dir()
    go(*TINY, "--method", "cot", "--out", tmp_path / "cot")
    for init in ("cot", MODEL):
        refused(train.main, [*TINY_RL, "--init", init, "--out", "rl"], f"{init}:0: ", "start --stage rl from an SFT run of --method atp")


def test_padding_and_truncation_that_a_tokenizer_file_asks_for_are_not_ours(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    raw = Tokenizer.from_file(str(MODEL / TOKENIZER))
    raw.enable_padding(length=50)
    raw.enable_truncation(3)
    raw.save(str(tmp_path / "model" / TOKENIZER))
    text = "Ann has 5 pens. Ann buys 7."
    assert load_model(tmp_path / "model")[1].encode(text) == load_model(MODEL)[1].encode(text)
