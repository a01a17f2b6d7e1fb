"""No option is ignored beside --init: each is taken, refused in one line, or free as --help says.

VERDICTS knows all options and all kinds of --init. An option without a row fails the first test.
"""

import json
import re
import sys
from contextlib import contextmanager

import pytest
import torch

import train
from minatp import data, problems
from minatp.run import options
from minatp.run.build import build
from minatp.run.checks import check_init
from minatp.run.errors import UserError
from minatp.run.huggingface import load_model, save_model
from minatp.run.splits import encode_problems
from minatp.sft import sft_losses

from runs import MODEL, TINY, go

# ---- the starts ----------------------------------------------------------------------------------

# What each has: the switches of ATP, and the stage that it has reached. All have MODEL's policy, of
# 3 layers, and φ has 1
PARTS = {
    "atp": dict(vae=True, stop=True, decode=True, stage=3),
    "no stop head": dict(vae=True, stop=False, decode=True, stage=3),
    "no decoder": dict(vae=True, stop=True, decode=False, stage=3),
    "sim-cot": dict(vae=False, stop=False, decode=True, stage=3),
    "coconut": dict(vae=False, stop=False, decode=False, stage=3),
    "codi": dict(vae=False, stop=False, decode=False, stage=3, project=True),
    "codi-sim-cot": dict(vae=False, stop=False, decode=True, stage=3, project=True),
    "pause": dict(vae=False, stop=False, decode=False, stage=3, fillers=1),
    "icot": dict(vae=False, stop=False, decode=False, stage=3, fillers=0),
    "cot": dict(vae=False, stop=False, decode=False, stage=0),
}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """{name: folder}: a model from a hub, and a saved one of each method, all with c = 1, K = 2."""
    root = tmp_path_factory.mktemp("starts")
    folders = {"hub": MODEL}
    for name, parts in PARTS.items():
        switches = {part: value for part, value in parts.items() if part != "stage"}
        model, tokenizer = load_model(MODEL, c=1, K=2, decoder_layers=1, **switches)
        model.stage = parts["stage"]
        folders[name] = root / name
        save_model(folders[name], model, tokenizer)
    return folders


# ---- the verdicts --------------------------------------------------------------------------------

# The columns of VERDICTS: (--stage, --method, the start)
COLUMNS = [
    ("sft", "atp", "hub"),
    ("sft", "atp", "atp"),
    ("sft", "atp", "cot"),
    ("sft", "atp", "sim-cot"),
    ("sft", "atp", "coconut"),
    ("sft", "cot", "atp"),
    ("sft", "codi", "atp"),
    ("sft", "pause", "pause"),
    ("sft", "atp", "pause"),
    ("sft", "icot", "icot"),
    ("rl", "atp", "atp"),
    ("rl", "atp", "no stop head"),
]

# For each option another value than the start has or the option's default, and what becomes of it
# in each column: t taken, r refused, f free (FREE says where --help says so)
# fmt: off
VERDICTS = {
    "stage":             ("--stage rl",                 "r t r r r r  r r r r  t t"),
    "method":            ("--method sim-cot",           "t t t t t t  t t t t  r r"),
    "preset":            ("--preset llama-1b",          "t r t r r t  r r t t  t t"),
    "init":              ("--init nowhere",             "r r r r r r  r r r r  r r"),
    "out":               ("--out o",                    "t t t t t t  t t t t  t t"),
    "resume":            ("--resume --out nowhere",     "r r r r r r  r r r r  r r"),
    "dry_run":           ("--dry-run",                  "t t t t t t  t t t t  t t"),
    "seed":              ("--seed 1",                   "t t t t t t  t t t t  t t"),
    "device":            ("--device cpu",               "t t t t t t  t t t t  t t"),
    "dtype":             ("--dtype bfloat16",           "t t t t t t  t t t t  t t"),
    "data":              ("--data d",                   "t t t t t t  t t t t  t t"),
    "val":               ("--data d --val v",           "t t t t t t  t t t t  t t"),
    "test":              ("--data d --test t",          "t t t t t t  t t t t  t t"),
    "labelled":          ("--labelled 50",              "t t t t t t  t t t t  t t"),
    "val_size":          ("--val-size 5",               "t t t t t t  t t t t  t t"),
    "test_size":         ("--test-size 5",              "t t t t t t  t t t t  t t"),
    "n_layer":           ("--n-layer 4",                "r r r r r r  r r r r  r r"),
    "n_head":            ("--n-head 8",                 "r r r r r r  r r r r  r r"),
    "n_kv_head":         ("--n-kv-head 1",              "r r r r r r  r r r r  r r"),
    "n_embd":            ("--n-embd 32",                "r r r r r r  r r r r  r r"),
    "n_inner":           ("--n-inner 32",               "r r r r r r  r r r r  r r"),
    "block_size":        ("--block-size 99",            "r r r r r r  r r r r  r r"),
    "rope_theta":        ("--rope-theta 5",             "r r r r r r  r r r r  r r"),
    "vocab_size":        ("--vocab-size 100",           "r r r r r r  r r r r  r r"),
    "decoder_layers":    ("--decoder-layers 2",         "t r t r t f  f f t f  r r"),
    "c":                 ("--c 2",                      "t r t r r f  r r t f  r r"),
    "K":                 ("--K 1",                      "t r t r r f  r r t r  r r"),
    "beta":              ("--beta 1",                   "t t t t t f  f f t f  t t"),
    "init_logvar":       ("--init-logvar -2",           "t r t t t f  f f t f  r r"),
    "decoder_start":     ("--decoder-start previews",   "t r t r t f  f f t f  r r"),
    "word_dropout":      ("--word-dropout .5",          "t t t t t f  f f t f  t t"),
    "distill":           ("--distill 2",                "t t t t t r  t r t r  t t"),
    "distill_every":     ("--distill 2 --distill-every 2", "t t t t t r  t r t r  t t"),
    "no_vae":            ("--no-vae",                   "t t t t t r  r r t r  r r"),
    "no_stop":           ("--no-stop",                  "t t t t t r  r r t r  r r"),
    "no_decoder":        ("--no-decoder",               "t t t t t r  r r t r  r r"),
    "epochs":            ("--epochs 3",                 "t t t t t t  t t t t  f f"),
    "batch_size":        ("--batch-size 8",             "t t t t t t  t t t t  t t"),
    "micro_batch":       ("--micro-batch 8",            "t t t t t t  t t t t  t t"),
    "optimizer":         ("--optimizer adamw",          "t t t t t t  t t t t  t t"),
    "lr":                ("--lr 1",                     "t t t t t t  t t t t  t t"),
    "last_lr":           ("--last-lr 1",                "t t t t t r  r t t t  f f"),
    "lr_schedule":       ("--lr-schedule wsd",          "t t t t t t  t t t t  t t"),
    "warmup":            ("--warmup 1",                 "t t t t t t  t t t t  t t"),
    "weight_decay":      ("--weight-decay 1",           "t t t t t t  t t t t  t t"),
    "clip":              ("--clip 2",                   "t t t t t t  t t t t  t t"),
    "answers_share":     ("--answers-share .5",         "t t t t t r  t t t t  f f"),
    "recompute":         ("--recompute",                "t t t t t t  t t t t  t t"),
    "updates":           ("--updates 2",                "f f f f f f  f f f f  t t"),
    "G":                 ("--G 2",                      "f f f f f f  f f f f  t t"),
    "answers":           ("--answers 50",               "t t t t t t  t t t t  t t"),
    "spread":            ("--spread 2",                 "f f f f f f  f f f f  t t"),
    "estimator":         ("--estimator score",          "f f f f f f  f f f f  t t"),
    "latent_weight":     ("--latent-weight 2 --estimator score", "f f f f f f  f f f f  t t"),
    "greedy":            ("--greedy",                   "f f f f f f  f f f f  t r"),
    "baseline":          ("--baseline rloo",            "f f f f f f  f f f f  t t"),
    "normalise":         ("--normalise",                "f f f f f f  f f f f  t t"),
    "updates_per_batch": ("--updates-per-batch 2",      "f f f f f f  f f f f  t t"),
    "w_acc":             ("--w-acc 2",                  "f f f f f f  f f f f  t t"),
    "w_coh":             ("--w-coh 2",                  "f f f f f f  f f f f  t t"),
    "w_fmt":             ("--w-fmt 2",                  "f f f f f f  f f f f  t t"),
    "coherence":         ("--coherence strict",         "f f f f f f  f f f f  t t"),
    "no_answers":        ("--no-answers",               "f f f f f f  f f f f  t t"),
    "kl":                ("--kl 1",                     "f f f f f f  f f f f  t t"),
    "anchor":            ("--anchor 2",                 "f f f f f f  f f f f  t t"),
    "placebo":           ("--placebo",                  "f f f f f f  f f f f  t t"),
    "placebo_latents":   ("--placebo-latents --estimator score", "f f f f f f  f f f f  t t"),
    "val_every":         ("--val-every 2",              "f f f f f f  f f f f  t t"),
    "max_new":           ("--max-new 9",                "t t t t t t  t t t t  t t"),
    "eval_batch":        ("--eval-batch 9",             "t t t t t t  t t t t  t t"),
    "votes":             ("--votes 2",                  "t t t t t t  t t t t  t t"),
    "temperature":       ("--temperature 2",            "t t t t t t  t t t t  t t"),
    "log_every":         ("--log-every 9",              "t t t t t t  t t t t  t t"),
    "sink":              ("--sink wandb",               "t t t t t t  t t t t  t t"),
    "save_every":        ("--save-every 9",             "t t t t t t  t t t t  t t"),
}

# Where --help says that an option has no effect: words of its group's title or of its own text
FREE = {
    "rl": "no effect in SFT",
    "sft": "SFT: ",
    "latents": "of a method that has them",
    "decoder": "the decoder LM, if there is one",
}
# fmt: on


def verdicts():
    """Every cell of the table: (option, the words on the command line, column, t | r | f)."""
    for name, (words, row) in VERDICTS.items():
        for column, verdict in zip(COLUMNS, row.split(), strict=True):
            yield name, words, column, verdict


def settle(argv):
    """Parse and check a command line, as train.py does before it reads any data."""
    cfg = options.parse([str(a) for a in argv], "")
    check_init(cfg)
    return cfg


def base(column, starts):
    stage, method, start = column
    return ["--stage", stage, "--method", method, "--init", starts[start]]


def actions():
    """{option: (its group's title, its text)} of --help, without --help itself."""
    listed = {}
    for group in options.build_parser("")._action_groups:
        for action in group._group_actions:
            listed[action.dest] = (group.title, action.help)
    del listed["help"]
    return listed


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_size_of_init_may_be_repeated_that_does_not_fit_the_default_of_another(stage):
    """SmolLM2 has 9 heads over 3, and 9 does not divide tiny's D."""
    argv = ["--stage", stage, "--init", "SmolLM2", "--n-head", "9", "--n-kv-head", "3"]
    assert options.parse(argv, "").n_head == 9


def test_every_option_has_a_row():
    assert VERDICTS.keys() == actions().keys(), "VERDICTS says how each start takes each option"


@pytest.mark.parametrize("column", COLUMNS, ids=" ".join)
def test_an_option_is_taken_or_refused(column, starts):
    settle(base(column, starts))
    wrong = []
    for name, words, its_column, verdict in verdicts():
        if its_column != column:
            continue
        try:
            cfg = settle([*base(column, starts), *words.split()])
            was_refused = False
        except UserError as e:
            was_refused = True
            assert re.match(r"\S.*: .*\S", str(e)) and "\n" not in str(e), name
        if was_refused != (verdict == "r"):
            wrong.append(name)
        elif not was_refused:
            assert name in cfg.given
    assert wrong == []


def test_help_says_which_options_are_free():
    texts = actions()
    for name, _, (stage, method, _), verdict in verdicts():
        if verdict == "f":
            title, text = texts[name]
            shown = " ".join((title, text))
            reasons = [FREE["sft"]] if stage == "rl" else [FREE["rl"]]
            if method != "atp":
                reasons = [FREE["rl"], FREE["latents"], FREE["decoder"]]
            assert any(reason in shown for reason in reasons), name


@pytest.mark.parametrize(
    "start",
    ["hub", "no decoder", *("sim-cot", "coconut", "codi", "codi-sim-cot", "pause", "icot", "cot")],
)
def test_rl_refuses_a_start_without_sampled_latents_or_a_decoder(start, starts, refused):
    reason = "start --stage rl from an SFT run of --method atp"
    refused(train.main, ["--stage", "rl", "--init", starts[start]], f"{starts[start]}:0: ", reason)


# fmt: off
@pytest.mark.parametrize("column, words", [
    (("sft", "atp", "atp"), "--n-layer 3 --n-embd 64 --rope-theta 500000 --vocab-size 390"),
    (("sft", "atp", "atp"), "--decoder-layers 1 --c 1 --K 2"),
    (("sft", "atp", "hub"), "--n-layer 3 --block-size 2048 --decoder-layers 3"),
    (("rl", "atp", "atp"), "--decoder-layers 1 --c 1 --K 2 --vocab-size 9999"),
])
# fmt: on
def test_an_option_may_repeat_what_the_start_has(column, words, starts):
    settle([*base(column, starts), *words.split()])


@pytest.mark.parametrize("words, reason", [
    ("--decoder-layers 4", "must be at most 3, the layers of --init"),
    ("--n-layer 4", "contradicts --init"),
])  # fmt: skip
def test_the_line_says_what_contradicts(words, reason, starts, refused):
    refused(train.main, ["--init", starts["hub"], *words.split()], "command line: ", reason)


# ---- what is read --------------------------------------------------------------------------------

# Read while the command line is parsed, or only with --data
READ_ELSEWHERE = {"preset", "val", "test"}


@contextmanager
def reads():
    """Yield a set to which the name of every option is added that something but a check reads."""
    names, read = set(VERDICTS), set()

    def watch(cfg, name):
        if name in names and not is_check(sys._getframe(1)):
            read.add(name)
        return object.__getattribute__(cfg, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options.Config, "__getattribute__", watch, raising=False)
        yield read


def is_check(frame):
    """Whether an option is read to parse or check it, or to copy all of them into a file."""
    while frame:
        function = frame.f_code.co_name
        if function.startswith("check_") or function in ("parse", "asdict"):
            return True
        frame = frame.f_back
    return False


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_run_reads_what_is_taken_and_nothing_that_is_free(stage, finished, commands, tmp_path):
    """The start of RL has been taught, so that there are rewards to learn from."""
    command = [*TINY, "--init", finished] if stage == "sft" else commands["rl"]
    with reads() as read:
        go(*command, "--votes", 1, "--out", tmp_path / "out")

    of_stage = [v for v in verdicts() if v[2] == (stage, "atp", "atp")]
    taken = {name for name, _, _, verdict in of_stage if verdict == "t"}
    free = {name for name, _, _, verdict in of_stage if verdict == "f"}
    assert taken - READ_ELSEWHERE - read == set()
    assert free & read == set()


# ---- what is built -------------------------------------------------------------------------------


def built(column, starts, words=""):
    """The model of a command line."""
    cfg = settle([*base(column, starts), *words.split()])
    model, _ = build(cfg, problems.generate("labelled", 9, 0))
    return model


# fmt: off
@pytest.mark.parametrize("start, words, n_layer", [
    ("hub", "--decoder-layers 1", 1),
    ("hub", "--decoder-layers 0", 3),
    ("hub", "--preset llama-1b", 3),       # the preset's is 0
    ("hub", "--n-layer 3", 1),             # the default is 1
    ("cot", "--decoder-layers 2", 2),
    ("coconut", "--decoder-layers 1", 1),
    ("atp", "", 1),                        # a φ that has been trained keeps its depth
    ("sim-cot", "--decoder-layers 1", 1),
])
# fmt: on
def test_the_decoder_gets_the_layers_that_are_asked_for(start, words, n_layer, starts):
    """A new φ is π's lower layers, with its embedding and its final norm."""
    model = built(("sft", "atp", start), starts, words)
    assert len(model.decoder.model.layers) == model.decoder.cfg.n_layer == n_layer
    if start not in ("atp", "sim-cot"):
        of_policy = model.policy.state_dict()
        for name, p in model.decoder.state_dict().items():
            assert torch.equal(p, of_policy[name]), name


def test_one_problem_is_enough_to_build_a_model_with_previews(starts):
    cfg = settle([*base(("sft", "atp", "hub"), starts), "--decoder-start", "previews"])
    model, _ = build(cfg, problems.generate("labelled", 1, 0))
    assert all(p.isfinite().all() for p in model.parameters())


def test_without_a_stage_0_there_are_no_previews(starts, capsys):
    column, words = ("sft", "atp", "cot"), "--c 1 --K 4 --decoder-start previews"
    assert built(column, starts, words).previews
    assert "no stage 0" not in capsys.readouterr().out
    model = built(column, starts, f"{words} --epochs 0,1,1,1,1,1")
    assert not model.previews and not model.decoder.reads_bos
    assert "note: there is no stage 0" in capsys.readouterr().out


def test_how_a_decoder_started_is_kept(starts, tmp_path):
    """A run says whether its φ reads bos; an option for a new φ does not change that."""
    column = ("sft", "atp", "hub")
    model = built(column, starts, "--c 1 --decoder-start previews")
    _, tokenizer = load_model(starts["hub"])
    assert model.previews and model.decoder.reads_bos
    save_model(tmp_path / "run", model, tokenizer)
    loaded, _ = load_model(tmp_path / "run")
    assert loaded.previews and loaded.decoder.reads_bos

    column, runs = ("sft", "atp", "run"), {"run": tmp_path / "run"}
    kept = built(column, runs, "--c 1 --K 4")
    assert kept.previews and kept.decoder.reads_bos
    with pytest.raises(UserError, match="--decoder-start copy contradicts --init"):
        settle([*base(column, runs), "--c", "1", "--decoder-start", "copy"])
    assert not built(("sft", "atp", "atp"), starts).previews


@pytest.mark.parametrize("has_started", [True, False, None])
def test_a_decoder_that_has_not_started_is_still_the_policy(has_started, starts, tmp_path):
    """Of a run that was stopped in stage 0. None: of a version that did not say, and it had."""
    model = built(("sft", "atp", "hub"), starts, "--c 1 --decoder-start previews")
    _, tokenizer = load_model(starts["hub"])
    model.stage, model.decoder_started = 0, bool(has_started)
    torch.nn.init.ones_(model.decoder.head)
    save_model(tmp_path, model, tokenizer)
    if has_started is None:
        file = tmp_path / "minatp" / "config.json"
        switches = json.loads(file.read_text())
        del switches["decoder_started"]
        file.write_text(json.dumps(switches))

    loaded, _ = load_model(tmp_path)
    assert loaded.decoder_started == (has_started is not False)
    head = model.policy.head if has_started is False else model.decoder.head
    assert torch.equal(loaded.decoder.head, head)


def test_a_default_gives_way_to_a_policy_of_fewer_layers(starts, tmp_path):
    model, tokenizer = load_model(MODEL, decode=False)
    del model.policy.model.layers[1:]
    model.policy.cfg.n_layer = 1
    save_model(tmp_path / "shallow", model, tokenizer)
    model = built(("sft", "atp", "shallow"), {"shallow": tmp_path / "shallow"}, "--c 2 --K 10")
    assert model.decoder.cfg.n_layer == 1


def test_a_model_cannot_start_from_one_of_fewer_layers(starts):
    model, _ = load_model(starts["atp"])  # φ has 1 layer, π 3
    with pytest.raises(ValueError, match="3 layers cannot start from the weights of 1"):
        model.policy.start_from(model.decoder)


@pytest.mark.parametrize("method", options.METHODS)
def test_each_method_learns_from_each_start(method, starts):
    """Also if it has another thing in place of its steps than the start has."""
    pair = problems.generate("labelled", 2, 0)
    for start in starts:
        argv = base(("sft", method, start), starts)
        model = built(("sft", method, start), starts)
        cfg, (_, tokenizer) = settle(argv), load_model(starts[start])
        has_parts = {name: getattr(model, name) for name in ("vae", "stop", "decode", "project")}
        assert has_parts.items() <= cfg.switches.items(), start
        assert model.fillers == cfg.switches["fillers"], start

        last_stage, _ = cfg.schedule()[-1]
        rows = encode_problems(cfg, pair, tokenizer, model)
        losses = sft_losses(model, data.collate(rows, last_stage, model, cfg.distill > 0))
        loss = sum(losses.values())
        loss.backward()
        assert loss.isfinite(), start


# fmt: off
@pytest.mark.parametrize("method, start, words, reason", [
    ("pause", "pause", "--c 2", "thinks with --c 1, not 2; give --c 1"),
    ("icot",  "icot",  "--K 1", "thinks with --K 2, not 1; give --K 2"),
    ("icot",  "icot",  "--c 2", None),        # it has nothing c of which could stand for a step
    ("atp",   "pause", "--c 2 --K 1", None),  # fillers are no latents
    ("pause", "atp",   "--c 2 --K 1", None),
    ("codi",  "atp",   "--c 2", "thinks with --c 1, not 2; give --c 1"),
    ("atp",   "codi",  "--K 1", "thinks with --K 2, not 1; give --K 2"),
])
# fmt: on
def test_c_and_k_bind_where_the_same_stands_for_a_step(method, start, words, reason, starts):
    argv = [*base(("sft", method, start), starts), *words.split()]
    if reason is None:
        settle(argv)
        return
    with pytest.raises(UserError, match=reason):
        settle(argv)


@pytest.mark.parametrize("start, n_new", [("hub", 0), ("atp", 0), ("cot", 3), ("sim-cot", 2)])
def test_parts_that_a_run_lacks_are_named(start, n_new, starts, capsys):
    settle(base(("sft", "atp", start), starts))
    assert capsys.readouterr().out.count("it starts untrained") == n_new


def test_parts_that_are_dropped_are_named_whatever_the_method(starts, capsys):
    settle(base(("sft", "cot", "atp"), starts))
    assert capsys.readouterr().out.count("it is dropped") == 3


def test_a_projection_is_named_where_it_comes_and_goes(starts, capsys):
    settle(base(("sft", "codi", "coconut"), starts))
    assert "has no projection: it starts untrained" in capsys.readouterr().out
    settle(base(("sft", "atp", "codi"), starts))
    assert "has a projection: it is dropped" in capsys.readouterr().out
    settle(base(("sft", "codi-sim-cot", "codi"), starts))
    assert "projection" not in capsys.readouterr().out


def test_an_untrained_latent_head_has_the_sigma_that_is_asked_for(starts):
    model = built(("sft", "atp", "sim-cot"), starts, "--init-logvar -2")
    D = model.policy.cfg.n_embd
    assert (model.latent_head.gaussian.bias[D:] == -2).all()
