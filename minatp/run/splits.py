"""Which problems a run learns from and is judged on: no question of the validation and test sets is in training."""
import hashlib
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from .. import data, problems
from .errors import UserError
from .options import Config, of_run
from .problem_files import read_problems


@dataclass
class Splits:
    train: list
    answers: list  # problems with an answer and no steps; where RL looks at no answer, all that lack one of the two
    val: list
    tests: dict   # name -> problems
    note: str     # what was left out, or ""

    @property
    def fingerprint(self):
        """A short hash of every problem, in order."""
        told = [[(p.question, p.steps, p.answer) for p in part] for part in (self.train, self.answers, self.held_out)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    @property
    def held_out(self):
        return [*self.val, *(p for problems in self.tests.values() for p in problems)]

    def describe(self):
        """Counts in one line."""
        bare = "with answers alone" if all(p.answer for p in self.answers) else "without answers or steps"
        parts = [("training", self.train), (bare, self.answers), ("validation", self.val)]
        parts += [(f"test ({name})", p) for name, p in self.tests.items()]
        return "  ".join(f"{len(p):,} {name}" for name, p in parts if p) + (f"   {self.note}" if self.note else "")


def load_splits(cfg):
    """Training, validation and test problems; no question of the last two is in the first, nor in what --init has learned from."""
    splits = split(cfg)
    if cfg.data and cfg.init:
        taught, untold = taught_to(cfg.init)
        held_out = {p.question for p in splits.held_out}
        if leaked := held_out & taught:
            raise UserError(f"{cfg.init}:0: has learned from {len(leaked)} of the {len(held_out)} questions that are held out here; give --val, "
                            "--test and --val-size as its config.json has them, or other files")
        if untold:
            splits.note += "; " * bool(splits.note) + f"whether {cfg.init} has learned from questions held out here cannot be told: {untold}"
    return splits


def split(cfg):
    """`load_splits`, without a look at --init."""
    if not cfg.data:
        n_answers = cfg.answers if cfg.stage == "rl" or cfg.answers_share else 0
        return Splits(generate("labelled", cfg.labelled, 0), generate("answers", n_answers, 0),
                      generate("validation", cfg.val_size, 0),
                      {"built-in": generate("test", cfg.test_size, 0)}, "")
    rl = cfg.stage == "rl"
    train = read_problems(cfg.data, answers=not (rl and cfg.no_answers))
    random.Random(0).shuffle(train)  # the same split for every seed of a run
    train.sort(key=lambda p: not p.answer)  # what is held out needs an answer
    held = []
    for option, given in (("--val", cfg.val), ("--test", cfg.test)):
        if given:
            held.append({Path(f).name: read_problems(f) for f in given.split(",")})
            if len(held[-1]) < 1 + given.count(","):
                raise UserError(f"command line: {option}: two files of the same name could not be told apart: {given}")
        else:
            if (n := sum(bool(p.answer) for p in train)) <= cfg.val_size:
                lacking = f" with an answer; give {option}" * (n < len(train))
                raise UserError(f"{cfg.data}:1: has {n} problems{lacking}, too few to hold out --val-size {cfg.val_size}")
            held.append({"held out": train[:cfg.val_size]})
            train = train[cfg.val_size:]
    val = [p for part in held[0].values() for p in part]
    unseen = {p.question for p in val} | {p.question for part in held[1].values() for p in part}
    kept = [p for p in train if p.question not in unseen]
    taught = kept if cfg.method == "no-cot" else [p for p in kept if p.steps and p.answer]
    if not taught and not (rl and kept and not cfg.anchor):
        raise UserError(f"{cfg.data}:1: no problem with steps is left to learn from" + "; RL can do without by --anchor 0" * rl)
    if cfg.answers_share and not rl and all(p.steps for p in kept):
        raise UserError(f"{cfg.data}:1: has no problem without steps for --answers-share {cfg.answers_share}; leave it away")
    left_out = [f"{len(train) - len(kept)} in the validation or test set"] * (len(kept) < len(train)) + \
               [f"{len(kept) - len(taught)} without steps (see --answers-share)"] * (len(taught) < len(kept) and not cfg.answers_share and not rl)
    note = "left out of training: " + ", ".join(left_out) if left_out else ""
    return Splits(taught, [p for p in kept if not (p.steps and p.answer)], val, held[1], note)


def options_of(folder):
    """The Config of the run that a folder is of, or its final/, or a checkpoint; None where it is no run's."""
    home = next((d for d in [Path(folder).absolute(), *Path(folder).absolute().parents][:3] if (d / "metrics.jsonl").exists()), None)
    return of_run(home / "config.json") if home else None


def taught_to(folder):
    """(the questions that a run has learned from, and the run that it began from; why that cannot be told, or "")."""
    cfg = options_of(folder)
    if not cfg:
        return set(), ""
    taught, gone = taught_to(cfg.init) if cfg.init else (set(), "")
    try:
        splits = split(cfg)
    except UserError as e:  # moved, or changed since
        return taught, str(e)
    return taught | {p.question for p in splits.train + splits.answers * (cfg.stage == "rl" or cfg.answers_share > 0)}, gone


def test_set(folder, n=0, seed=0):
    """The first n problems (0: all) of a run's test sets; for a folder that is no run's, of the built-in task's, and of that for another seed
    others."""
    trained = options_of(folder) or Config()
    if not trained.data:
        return generate("test", n or trained.test_size, seed)
    tests = [read_problems(f) for f in trained.test.split(",")] if trained.test else split(trained).tests.values()
    return [p for found in tests for p in found][: n or None]


def encode_prompts(problems, tokenizer, model, max_new):
    """The prompts of problems, lists of ids. Raises UserError if one leaves no room for latents and an answer."""
    prompts = tokenizer.prompts([p.question for p in problems])
    room = model.policy.cfg.block_size - model.c * model.K - max_new - 1
    for p, prompt in zip(problems, prompts):
        if len(prompt) > room:
            raise UserError(
                f"{p.source}: the question {p.question[:40]!r} … is {len(prompt)} tokens long and there is room for {room}; "
                "shorten it or lower --max-new"
            )
    return prompts


def encode_problems(cfg, problems, tokenizer, model, answer_only=False):
    """Problems as the method reads them -> a list of data.Encoded. Raises UserError if one is too long."""
    if cfg.method == "no-cot":
        problems = [replace(p, steps=[]) for p in problems]
    always_K = answer_only or (cfg.latent and not model.stop)
    try:
        return data.encode(problems, tokenizer, model, answer_only, always_K)
    except ValueError as e:
        raise UserError(str(e)) from None


def generate(which, n, seed):
    """problems.generate. Raises UserError if n is too large."""
    try:
        return problems.generate(which, n, seed)
    except ValueError as e:
        raise UserError(str(e)) from None
