"""Which problems a run learns from, and which it is judged on.

    load_splits     training, validation and test problems, of the built-in task or from files
    test_set        the test problems of a run, to measure it again

No question of the validation and test sets is in training, nor in the training of --init, however
it is spelled (problems.normal_form).
"""

import hashlib
import json
import os
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from .. import data, problems
from ..problems import normal_form
from .errors import UserError
from .huggingface import read_json
from .options import Config, of_run
from .problem_files import read_problems
from .saved import checkpoints


@dataclass
class Splits:
    """All problems of a run, by use."""

    train: list  # problems with steps and an answer
    answers: list  # problems without steps; with RL's --no-answers, also those without an answer
    val: list
    tests: dict  # name -> problems
    note: str = ""  # what was left out, for the user

    @property
    def held_out(self):
        """All problems that the run must not learn from."""
        return [*self.val, *(p for problems in self.tests.values() for p in problems)]

    @property
    def fingerprint(self):
        """A short hash of every problem, in order. A resumed run must have the same."""
        # Without `source`: files may be moved
        contents = []
        for part in (self.train, self.answers, self.held_out):
            contents.append([(p.question, p.steps, p.answer) for p in part])
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]

    def add_note(self, note):
        self.note = f"{self.note}; {note}" if self.note else note

    def describe(self):
        """The number of problems of each kind, in one line."""
        # With --no-answers RL also explores problems that have no answer
        incomplete = "with answers alone"
        if not all(p.answer for p in self.answers):
            incomplete = "without answers or steps"
        parts = {"training": self.train, incomplete: self.answers, "validation": self.val}
        for name, part in self.tests.items():
            parts[f"test ({name})"] = part
        line = "  ".join(f"{len(part):,} {name}" for name, part in parts.items() if part)
        return f"{line}   {self.note}" if self.note else line


# ---- the problems of a run -----------------------------------------------------------------------


def load_splits(cfg):
    """The Splits of a Config. Raises UserError if --init was trained on a held-out question."""
    splits = split_as_begun(cfg, cfg.out) if cfg.resume else split(cfg)

    # The built-in sets never overlap; files may
    if cfg.data and cfg.init:
        refuse_leaks(cfg, splits)
    return splits


def refuse_leaks(cfg, splits):
    """Raise UserError if --init was trained on a held-out question; add a note if it is unknown.

    A resumed run has already started from it, so there a leak is only noted.
    """
    learned, why_unknown = learned_questions(cfg.init)
    held_out = questions_of(splits.held_out)
    leaked = held_out & learned
    if leaked:
        what = (
            f"was trained on {len(leaked)} of the {len(held_out)} questions that are held out here"
        )
        if not cfg.resume:
            raise UserError(
                f"{cfg.init}:0: {what}; give --val, --test and --val-size as in its config.json, "
                "or other files"
            )
        splits.add_note(f"{cfg.init} {what}")

    # A run whose files are gone cannot be checked: tell the user, and go on
    if why_unknown:
        splits.add_note(
            f"unknown whether {cfg.init} was trained on questions held out here: {why_unknown}"
        )


def questions_of(problems):
    """The questions of some problems, as a set of texts that can be compared."""
    return {normal_form(p.question) for p in problems}


def learned_questions(folder, later=()):
    """The questions that a run was trained on, with those of the run that it started from.

    Returns (`questions_of`, why some are unknown or ""). A published model has none.
    later: the runs that started from it, which it cannot have started from itself.
    """
    run = run_of(folder)
    if not run:
        is_gone = not Path(folder).exists()
        return set(), f"{folder} is gone" if is_gone else why_no_run(folder)
    if run in later:
        return set(), f"{folder} has been trained again since"
    try:
        cfg = options_of(run)
    except UserError as e:
        return set(), str(e)

    # What --init has learned, this run has learned, and so on back to the first
    questions, why_unknown = set(), ""
    if cfg.init:
        questions, why_unknown = learned_questions(cfg.init, (*later, run))

    # To know which of its problems it has trained on, split them as the run did
    try:
        splits = split_as_begun(cfg, run)
        require_unchanged(splits, cfg, run)
    except UserError as e:  # its files have been moved or changed
        return questions, f"{why_unknown}; {e}" if why_unknown else str(e)

    # SFT leaves problems without steps alone unless --answers-share asks for them
    questions |= questions_of(splits.train)
    if cfg.stage == "rl" or cfg.answers_share > 0:
        questions |= questions_of(splits.answers)
    return questions, why_unknown


def split_as_begun(cfg, run):
    """The Splits of the run in a folder, as they were when it began.

    Before questions were compared in normal form, a held-out question in another spelling stayed in
    training. The saved hash tells how a run has compared; without one, the normal form is assumed.
    """
    splits = split(cfg)
    saved = saved_fingerprint(run)
    if not cfg.data or saved in (None, splits.fingerprint):
        return splits

    # If neither fits, the files have changed: check_problems refuses to resume with them
    by_letter = split_files(cfg, form=str)
    if saved != by_letter.fingerprint:
        return splits
    learned = questions_of([*by_letter.train, *by_letter.answers])
    n = len(learned & questions_of(by_letter.held_out))
    by_letter.add_note(f"{n} in training are in the validation or test set, in another spelling")
    return by_letter


def require_unchanged(splits, cfg, run):
    """Raise UserError if these are not the problems with which the run in a folder began."""
    if cfg.data and saved_fingerprint(run) not in (None, splits.fingerprint):
        raise UserError(
            f"{place_of(cfg)}: the problems are not those with which {run} began (was a file "
            "changed?)"
        )


def saved_fingerprint(run):
    """The hash of the problems that a run has saved; None if there is none."""
    records = [checkpoint / "state.json" for checkpoint in checkpoints(run)]
    for path in (*records, Path(run) / "summary.json"):
        try:
            return read_json(path).get("data")
        except UserError:  # a broken one, or none
            continue
    return None


def split(cfg):
    """`load_splits` without the check of --init."""
    if cfg.data:
        return split_files(cfg)
    needs_answers = cfg.stage == "rl" or cfg.answers_share

    # The same problems for every --seed, so that the runs of several seeds can be compared
    return Splits(
        train=generate("labelled", cfg.labelled, seed=0),
        answers=generate("answers", cfg.answers if needs_answers else 0, seed=0),
        val=generate("validation", cfg.val_size, seed=0),
        tests={"built-in": generate("test", cfg.test_size, seed=0)},
    )


def split_files(cfg, form=normal_form):
    """The Splits of --data, --val and --test. form: of the questions that are compared."""
    needs_answers = not (cfg.stage == "rl" and cfg.no_answers)
    paths = paths_of("--data", cfg.data)
    given = [p for path in paths for p in read_problems(path, needs_answers)]
    random.Random(0).shuffle(given)  # the same split for every seed of a run
    given.sort(key=lambda p: not p.answer)  # first those with an answer: what is held out needs one

    # Hold out validation and test problems, unless they have files of their own
    val_sets, given = hold_out(cfg, "--val", cfg.val, given)
    tests, given = hold_out(cfg, "--test", cfg.test, given)
    val = [p for part in val_sets.values() for p in part]

    # Leave out of training what is also in those files
    splits = Splits(train=[], answers=[], val=val, tests=tests)
    held_out = {form(p.question) for p in splits.held_out}
    kept = [p for p in given if form(p.question) not in held_out]

    # no-cot drops the steps, so it learns from problems without any as well
    splits.train = [p for p in kept if p.steps and p.answer]
    splits.answers = [p for p in kept if not (p.steps and p.answer)]
    if cfg.method == "no-cot":
        splits.train = kept
    check_training(cfg, splits, kept)
    splits.note = describe_omissions(cfg, given, kept, splits.train)
    return splits


def hold_out(cfg, option, files, given):
    """({name: problems}, the problems that are left to train on), for --val or --test.

    files: the option's value. Without any, --val-size of the given problems are held out.
    """
    if files:
        # Test sets are named after their files, in the log and in summary.json
        paths = paths_of(option, files)
        sets = {Path(path).name: read_problems(path) for path in paths}
        if len(sets) < len(paths):
            raise UserError(
                f"command line: {option}: two files of the same name cannot be told apart: {files}"
            )
        return sets, given

    # Take the first: they are shuffled, and those with an answer come first
    n_with_answer = sum(bool(p.answer) for p in given)
    if n_with_answer <= cfg.val_size:
        left = " left after validation" if option == "--test" and not cfg.val else ""
        lacking = "" if n_with_answer == len(given) else " with an answer"
        raise UserError(
            f"{place_of(cfg)}: has {n_with_answer} problems{lacking}{left}, too few to hold out "
            f"--val-size {cfg.val_size}; give {option}, or lower --val-size"
        )
    return {"held out": given[: cfg.val_size]}, given[cfg.val_size :]


def paths_of(option, files):
    """The value of an option such as --data, paths separated by commas -> a list of paths.

    Raises UserError if one is empty or is given twice.
    """
    if os.path.exists(files):  # a name may have a comma
        return [files]
    paths = [path.strip() for path in files.split(",")]
    if not all(paths) or len(set(paths)) < len(paths):
        raise UserError(
            f"command line: {option}: give each file once, separated by single commas: {files}"
        )
    return paths


def place_of(cfg):
    """What an error message begins with if it is about the training problems as a whole."""
    return "command line: --data" if len(paths_of("--data", cfg.data)) > 1 else f"{cfg.data}:1"


def check_training(cfg, splits, kept):
    """Raise UserError if nothing is left to learn from. kept: all problems not held out."""
    # SFT learns from steps, and so does RL's anchor; RL without it needs questions alone
    is_rl = cfg.stage == "rl"
    needs_steps = not is_rl or cfg.anchor or not kept
    if needs_steps and not splits.train:
        remedy = "; RL can do without them with --anchor 0" if is_rl else ""
        raise UserError(f"{place_of(cfg)}: no problem with steps is left to learn from{remedy}")
    if cfg.answers_share and not is_rl and all(p.steps for p in kept):
        raise UserError(
            f"{place_of(cfg)}: has no problem without steps for --answers-share "
            f"{cfg.answers_share}; drop the option"
        )


def describe_omissions(cfg, given, kept, train):
    """What was left out of training, and why; "" if nothing was."""
    omissions = []
    if len(kept) < len(given):
        omissions.append(f"{len(given) - len(kept)} in the validation or test set")

    # RL explores problems without steps, and --answers-share learns from them
    if len(train) < len(kept) and not cfg.answers_share and cfg.stage != "rl":
        omissions.append(f"{len(kept) - len(train)} without steps (see --answers-share)")
    return "left out of training: " + ", ".join(omissions) if omissions else ""


# ---- the problems of a run that has been trained -------------------------------------------------


def run_of(folder):
    """The folder of the run that a folder belongs to: its own, or that of its final/ or checkpoint.

    None for other folders.
    """
    # final/ is one folder below the run's, a checkpoint is two. A link to either will do
    for path in (Path(folder).absolute(), Path(folder).resolve()):
        for candidate in [path, *path.parents][:3]:
            if (candidate / "metrics.jsonl").exists():
                return candidate
    return None


def why_no_run(folder):
    """Why it is unknown what a model of ours has learned from; "" for a published model."""
    if (Path(folder) / "minatp").exists():
        return f"{folder} was taken out of its run's folder"
    return ""


def options_of(folder):
    """The Config of a run, from its folder, its final/ or a checkpoint; None for other folders."""
    run = run_of(folder)
    return of_run(run / "config.json") if run else None


def test_set(folder, n=0, seed=0):
    """The first n problems (0: all) of a run's test sets.

    A folder that is not a run's gets those of the built-in task. seed: another one generates other
    problems of that task. Raises UserError if the run's files have changed.
    """
    run = run_of(folder)
    cfg = options_of(folder) or Config()
    why = "" if run else why_no_run(folder)
    if why:
        sys.stderr.write(
            f"note: {why}, so the problems are those of the built-in task; give --file for others\n"
        )
    if not cfg.data:
        return generate("test", n or cfg.test_size, seed)

    # Test files can be read by themselves; what was held out is found by splitting again
    try:
        if cfg.test:
            tests = [read_problems(path) for path in paths_of("--test", cfg.test)]
        else:
            splits = split_as_begun(cfg, run)
            require_unchanged(splits, cfg, run)
            tests = splits.tests.values()
    except UserError as e:
        raise UserError(
            f"{e} (by {run}/config.json; to measure on other problems give --file)"
        ) from None
    every_problem = [p for part in tests for p in part]
    return every_problem[:n] if n else every_problem


# ---- the method's functions, with a UserError for the user ---------------------------------------


def encode_prompts(problems, tokenizer, model, max_new):
    """Problems -> prompts, lists of ids.

    Raises UserError if one leaves no room for the latents, <|end-latent|> and max_new tokens.
    """
    prompts = tokenizer.prompts([p.question for p in problems])
    room = model.policy.cfg.block_size - model.c * model.K - max_new - 1
    for p, prompt in zip(problems, prompts):
        if len(prompt) > room:
            raise UserError(
                f"{p.source}: the question {p.question[:40]!r} … is {len(prompt)} tokens long but "
                f"there is room for only {room}; shorten it or lower --max-new"
            )
    return prompts


def encode_problems(cfg, problems, tokenizer, model, answer_only=False):
    """Problems -> rows of data.Encoded, for the method of cfg. Raises UserError if one is too long.

    answer_only: the steps of the problems are unknown.
    """
    # no-cot answers at once: for it, problems have no steps
    if cfg.method == "no-cot":
        problems = [replace(p, steps=[]) for p in problems]

    # Without labels for the steps, or without a stop head, each problem takes as many as it may
    takes_all_steps = answer_only or (cfg.replaces_steps and not model.stop)
    try:
        return data.encode(problems, tokenizer, model, answer_only, takes_all_steps)
    except ValueError as e:
        raise UserError(str(e)) from None


def describe_cut_off(max_new, lengths):
    """A note on the right answers that are longer than --max-new; "" if all fit.

    lengths: {set of problems: [tokens of each right answer]}.
    """
    parts = []
    for name, tokens in lengths.items():
        n = sum(length > max_new for length in tokens)
        if n:
            parts.append(f"{n:,} of {len(tokens):,} {name} problems")
    if not parts:
        return ""
    longest = max(length for tokens in lengths.values() for length in tokens)
    return (
        f"note: --max-new {max_new} cuts off the right answers of {', '.join(parts)}; the longest "
        f"needs {longest}"
    )


def generate(which, n, seed):
    """problems.generate. Raises UserError if n is too large."""
    try:
        return problems.generate(which, n, seed)
    except ValueError as e:
        raise UserError(str(e)) from None
