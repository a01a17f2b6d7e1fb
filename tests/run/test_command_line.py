"""Mistakes in train.py's command line: exit code 2 and one line on stderr that says what to do."""

from dataclasses import fields

import pytest

import train
from minatp.run import options
from minatp.run.options import Data, Explore, General, Latents, Optim, Report, Size
from minatp.run.saved import checkpoints
from minatp.run.splits import test_set as load_test_set  # pytest would collect its own name

from runs import GOOD, MODEL, TINY, TINY_RL, go

SMOL = "--preset smollm2-135m --init x"
SMALL_SETS = ("--labelled", 40, "--test-size", 5, "--val-size", 5)


# fmt: off
@pytest.mark.parametrize("argv, reason", [
    # Not an option, or not a value of its type
    ("--methd cot", "there is no option --methd; did you mean --method?"),
    ("--xyzzy 1", "there is no option --xyzzy; --help lists them"),
    ("extra", "there is no option extra"),
    ("--lr", "argument --lr: expected one argument"),
    ("--lr fast", "argument --lr: invalid float value: 'fast'"),
    ("--K 2.5", "argument --K: invalid int value: '2.5'"),

    # Out of range
    ("--lr -1", "--lr must be positive"),
    ("--lr nan", "--lr must be"),
    ("--last-lr -1", "--last-lr must not be negative"),
    ("--w-acc inf", "--w-acc must be a finite number"),
    ("--K 0", "--K must be positive"),
    (f"--K {10**20}", "--K must be at most 10,000"),
    ("--init x --K 10001 --epochs 1", "--K must be at most 10,000"),
    ("--epochs 1e308", "numbers ≥ 0, below 1,000,000"),
    ("--temperature 1e-38", "--temperature must be at least 1e-06"),
    ("--batch-size 0", "--batch-size must be positive"),
    ("--seed -1", "--seed must not be negative"),
    (f"--seed {10**20}", "--seed must be below 2^32"),
    (f"--n-layer {10**30}", "--n-layer must be below 2^32"),
    ("--vocab-size -5", "--vocab-size must be positive"),
    ("--rope-theta 0", "--rope-theta must be positive"),
    ("--micro-batch -2", "--micro-batch must not be negative"),
    ("--answers-share 2", "--answers-share must be between 0 and 1"),
    ("--stage rl --G 1", "--G must be at least 2"),
    ("--distill -1", "--distill must not be negative"),
    ("--word-dropout 1.1", "--word-dropout must be between 0 and 1, not 1.1"),
    ("--word-dropout -1", "--word-dropout must be between 0 and 1, not -1"),
    ("--lr-schedule linear", "--lr-schedule must be cosine or wsd"),
    ("--distill nan", "--distill must be a finite number"),
    ("--stage rl --latent-weight -1", "--latent-weight must not be negative"),

    # Not one of the words
    ("--method sft", "--method must be one of"),
    ("--stage dream", "--stage must be"),
    ("--preset huge", "--preset must be one of"),
    ("--baseline best", "--baseline must be mean or rloo"),
    ("--optimizer sgd", "--optimizer must be muon or adamw"),
    ("--estimator guess", "--estimator must be"),
    ("--coherence loose", "--coherence must be"),
    ("--device tpu", "--device 'tpu'"),
    ("--device cuda:99", "--device cuda:99"),
    ("--device meta", "--device 'meta' is not supported"),

    # Sizes that do not fit together
    ("--c 200", "--c 200 × --K 4 latents do not fit --block-size 512"),
    ("--max-new 508", "--c 1 × --K 4 latents and --max-new 508 do not fit --block-size 512"),
    ("--n-layer 1 --decoder-layers 2", "--decoder-layers 2 must be at most --n-layer 1"),
    ("--n-head 3", "--n-embd 128 must be an even multiple of --n-head 3"),
    ("--n-kv-head 3", "--n-head 4 must be a multiple"),

    # The curriculum
    ("--epochs 1,2", "--epochs needs 1 or 6 numbers"),
    ("--epochs x", "--epochs must be numbers"),
    ("--epochs nan", "--epochs needs"),
    ("--epochs 0", "--epochs needs"),
    ("--epochs inf", "--epochs needs"),
    ("--answers-share .5 --epochs 1,0,0,0,0,0", "none here"),
    ("--answers-share .5 --method cot", "none here"),
    ("--answers-share .01", "--answers-share 0.01 rounds to 0 of the 32 problems"),
    ("--answers-share .99", "--answers-share 0.99 rounds to 32 of the 32 problems"),
    ("--last-lr .1 --epochs 1,0,0,0,0,0", "--last-lr is for the last stage"),
    ("--last-lr .1 --method cot", "none here; give --lr"),
    ("--last-lr .1 --method codi", "none here; give --lr"),
    ("--method codi --epochs 1,2", "--epochs needs 1 or 1 numbers"),
    ("--method pause --epochs 1,2", "--epochs needs 1 or 6 numbers"),

    # Options that contradict each other, or need another
    ("--method cot --no-vae", "--no-vae contradicts --method cot"),
    ("--method codi --no-decoder", "--no-decoder contradicts --method codi"),
    ("--no-vae --no-stop --no-decoder", "is --method coconut"),
    ("--distill 0 --distill-every 2", "--distill-every is about --distill"),
    ("--decoder-start else", "--decoder-start must be copy or previews"),
    ("--method cot --distill 1", "--distill teaches latents, and --method cot has none"),
    ("--method icot --distill 1", "--distill teaches latents, and --method icot has none"),
    ("--method pause --distill 1", "--distill teaches latents, and --method pause has none"),
    ("--stage rl --placebo-latents", "--placebo-latents is about the density"),
    ("--stage rl --latent-weight .1", "give --estimator score"),
    ("--test x.json", "--test needs --data"),
    ("--val x.json", "--val needs --data"),
    ("--data a --test x/a,y/a", "two files of the same name"),
    (
        "--preset llama-1b",
        "--preset llama-1b needs --init DIR, a Hugging Face directory of Llama-3.2-1B; to train it "
        "from scratch, give --data, or --dry-run",
    ),
    ("--preset smollm2-135m", "a Hugging Face directory of SmolLM2-135M-Instruct"),
    ("--stage rl --method cot", "uses the method of --init"),
    ("--stage rl --no-stop", "uses the method of --init"),
])
# fmt: on
def test_command_lines(argv, reason, refused, tmp_path):
    for name in ("a", "x/a", "y/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{GOOD}\n" * 9)
    refused(train.main, [*SMALL_SETS, *argv.split()], "command line: ", reason)


# fmt: off
@pytest.mark.parametrize("argv, start, reason", [
    (["--init", "nowhere"], "nowhere:0: ", "is not a directory"),
    (["--stage", "rl", "--init", "nowhere"], "nowhere:0: ", "is not a directory"),
    (["--resume", "--out", "nowhere"], "nowhere/config.json:0: ", "start without --resume"),
    (["--block-size", 20], "built-in labelled:1: ", "context is 20"),
    (["--labelled", 10**9], "built-in labelled:0: ", "ask for 1,000,000 at most"),
])
# fmt: on
def test_command_lines_with_a_wrong_path_or_size(argv, start, reason, refused):
    refused(train.main, [*SMALL_SETS, "--answers", 5, *argv], start, reason)


def test_answers_alone_that_the_data_lacks(tmp_path, refused):
    lines = [f"q{i}||<<1+1=2>> #### 2\n" for i in range(9)]
    (tmp_path / "a").write_text("".join(lines))
    argv = ["--data", tmp_path / "a", "--val-size", 2, "--answers-share", 0.5, "--out", "o"]
    refused(train.main, argv, f"{tmp_path / 'a'}:1: ", "without steps")


# ---- --init --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_inner", [40, 352])  # 352 is the preset's: it counts once it is given
@pytest.mark.parametrize("command", [TINY, TINY_RL])
def test_a_size_that_the_model_does_not_have(command, n_inner, finished, refused):
    argv = [*command, "--n-inner", n_inner, "--init", finished, "--out", "o"]
    reason = f"--n-inner {n_inner} contradicts --init {finished}, which has 24"
    refused(train.main, argv, "command line: ", reason)


@pytest.mark.parametrize("option, value", [("--c", 3), ("--K", 4)])
def test_rl_keeps_the_latents_that_sft_has_settled(option, value, finished, refused):
    argv = [*TINY_RL, option, value, "--init", finished, "--out", "o"]
    reason = f"{option} {value} contradicts --init {finished}, which has"
    refused(train.main, argv, "command line: ", reason)


@pytest.mark.parametrize(
    "argv, has, wanted", [(["--c", 3], "--c 1", 3), (["--K", 1, "--epochs", 1], "--K 2", 1)]
)
def test_sft_continues_with_the_latents_that_were_taught(argv, has, wanted, finished, refused):
    reason = f"thinks with {has}, not {wanted}; give {has}"
    refused(
        train.main, [*TINY, *argv, "--init", finished, "--out", "o"], "command line: ", reason
    )


def test_a_part_of_init_that_is_dropped_is_named(finished, tmp_path, capsys):
    go(*TINY, "--method", "sim-cot", "--init", finished, "--out", tmp_path / "o", "--dry-run")
    out = capsys.readouterr().out
    assert f"note: --init {finished} has a stop head: it is dropped" in out


# ---- the test set and --help ---------------------------------------------------------------------


def test_the_test_set_of_a_run_is_that_of_its_saved_models(finished):
    of_run = load_test_set(finished)
    assert of_run
    assert load_test_set(finished / "final") == of_run
    assert load_test_set(checkpoints(finished)[0]) == of_run
    assert load_test_set(MODEL) != of_run


def test_another_seed_shows_other_problems_at_once(finished):
    """The largest seed, too. Seed 0 shows the first ones."""

    def questions(*args):
        return [p.question for p in load_test_set(finished, *args)]

    shown = [questions(4, seed) for seed in (0, 1, 2**32 - 1)]
    assert shown[0] == questions()[:4]
    assert not set(shown[0]) & set(shown[1]) & set(shown[2])


# fmt: off
@pytest.mark.parametrize("argv, epochs", [
    ("", "2.5,0.5,0.5,0.5,0.8,13.4"),
    ("--distill 0", "2.5,0.5,0.5,0.5,0.8,16"),  # without a teacher, as many seconds
    ("--method cot", "16"),
    ("--method pause", "5,0.5,0.5,0.5,0.8,11"),
    ("--method codi", "18"),
    ("--method codi-sim-cot --labelled 3000", "28.6"),
    ("--method sim-cot", "2.5,0.5,0.5,0.5,0.8,16"),
    ("--method sim-cot --distill 1", "2.5,0.5,0.5,0.5,0.8,13.4"),
    ("--method coconut --distill 1", "5,0.5,0.5,0.5,0.8,11"),  # without φ
    ("--labelled 3000 --K 2", "5,1,1.6,26.8"),  # as many steps
    ("--preset smollm2-135m --init x", "1,1,1,1,3"),
    ("--preset smollm2-135m --init x --K 5 --labelled 60", "1,1,1,1,1,1,3"),
    ("--preset smollm2-135m --init x --method cot", "3"),
    ("--preset llama-1b --init x", "2"),
])
# fmt: on
def test_the_epochs_of_a_preset(argv, epochs):
    assert options.parse(argv.split(), "").epochs == epochs


# fmt: off
@pytest.mark.parametrize("argv, before, last", [
    ("", 2e-3, 2e-3),
    ("--last-lr .1", 2e-3, 0.1),
    ("--lr .1 --last-lr .2 --method pause", 0.1, 0.2),
    (SMOL, 1e-4, 3e-5),
    (SMOL + " --last-lr 1e-5", 1e-4, 1e-5),
    (SMOL + " --lr 2e-4", 2e-4, 2e-4),  # an --lr alone is for all stages
    (SMOL + " --method codi", 1e-4, 1e-4),  # one stage, which is not the last of a curriculum
])
# fmt: on
def test_the_learning_rate_of_the_last_stage(argv, before, last):
    cfg = options.parse(argv.split(), "")
    assert (cfg.peak_lr(cfg.K), cfg.peak_lr(cfg.K + 1)) == (before, last)


@pytest.mark.parametrize("argv", ["--stage rl", f"{SMOL} --stage rl", "--stage rl --last-lr .1"])
def test_rl_has_one_learning_rate(argv):
    cfg = options.parse(argv.split(), "")
    assert cfg.peak_lr(None) == cfg.lr


# fmt: off
@pytest.mark.parametrize("argv, distill, every", [
    ("", 5, 2), ("--distill 2", 2, 2), ("--distill 0", 0, 1), ("--distill-every 3", 5, 3),
    ("--stage rl", 0, 1), ("--stage rl --distill 2", 2, 1),
    ("--preset llama-1b --init x", 0, 1), ("--preset smollm2-135m --init x", 0, 1),
    ("--method coconut", 0, 1), ("--method coconut --distill 2", 2, 1), ("--method cot", 0, 1),
    ("--method codi", 5, 1), ("--method codi-sim-cot", 5, 1), ("--method codi --distill 0", 0, 1),
    ("--method codi --preset llama-1b --init x", 20, 1),
])
# fmt: on
def test_the_distillation_of_a_method_and_preset(argv, distill, every):
    cfg = options.parse(argv.split(), "")
    assert (cfg.distill, cfg.distill_every) == (distill, every)


# fmt: off
@pytest.mark.parametrize("argv, decoder_layers, word_dropout, lr_schedule, weight_decay", [
    ("", 1, 0.5, "wsd", 0.1),
    ("--no-decoder", 1, 0.5, "wsd", 0.1),  # without effect on φ, which is not there
    ("--decoder-layers 2 --word-dropout 0", 2, 0, "wsd", 0.1),
    ("--lr-schedule cosine --weight-decay 0", 1, 0.5, "cosine", 0),
    ("--stage rl", 1, 0, "cosine", 0.01),
    ("--stage rl --word-dropout .1", 1, 0.1, "cosine", 0.01),
    ("--method sim-cot", 1, 0.5, "wsd", 0.1),
    ("--method codi-sim-cot", 1, 0.5, "wsd", 0.1),
    ("--method codi", 1, 0, "wsd", 0.1),
    ("--method cot", 1, 0, "wsd", 0.1),
    ("--preset smollm2-135m --init x", 0, 0, "cosine", 0.01),
    ("--preset llama-1b --init x", 0, 0, "cosine", 0.01),
])
# fmt: on
def test_what_tiny_gives_a_method(argv, decoder_layers, word_dropout, lr_schedule, weight_decay):
    cfg = options.parse(argv.split(), "")
    of_phi = (cfg.decoder_layers, cfg.word_dropout)
    assert of_phi == (decoder_layers, word_dropout)
    assert (cfg.lr_schedule, cfg.weight_decay) == (lr_schedule, weight_decay)


def test_help_shows_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(options.Config):
        assert f"{options.flag(field.name)} " in shown

    # A default that depends on the preset, and one that does not
    tiny = options.parse(["--preset", "tiny", "--init", "x"], "")
    large = options.parse(["--preset", "llama-1b", "--init", "x"], "")
    assert tiny.c != large.c
    assert f"latents per reasoning step [{tiny.c}; llama-1b {large.c}]" in shown
    assert f"of weights, data order and noise [{tiny.seed}]" in shown
    # … and one that depends on the method
    assert "[0.0; tiny sim-cot 0.5; tiny codi-sim-cot 0.5; tiny atp 0.5]" in shown

    for group in (General, Data, Latents, Optim, Explore, Size, Report):
        assert f" {group.__doc__}: --" in shown
