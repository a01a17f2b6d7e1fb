"""What a run refuses: an --init that does not fit the options, changed problems, bad rewards."""

import hashlib
from dataclasses import fields

from .errors import NotFinite, UserError
from .huggingface import read_switches
from .options import Size, flag
from .terminal import print0


def check_size(model, cfg):
    """Raise UserError if an option asks for another size of model than --init has."""
    # Only the command line can contradict --init: a default gives way. --vocab-size is a limit for
    # a tokenizer that is trained, and --init brings its own
    for f in fields(Size):
        if f.name not in cfg.given or f.name == "vocab_size":
            continue
        has, wanted = getattr(model.policy.cfg, f.name, None), getattr(cfg, f.name)
        if has not in (None, wanted):
            raise UserError(
                f"command line: {flag(f.name)} {wanted} contradicts --init {cfg.init}, which has "
                f"{has}; drop one of them"
            )


def check_thoughts(cfg):
    """RL explores in sampled latents, whose number SFT has settled, and rewards what φ reads.

    Raises UserError if --init has none, or an option asks for another number.
    """
    saved = read_switches(cfg.init)

    # Stage 0 will not do: there all reasoning is still text
    if not (saved.get("vae") and saved.get("decode") and saved.get("stage")):
        raise UserError(
            f"{cfg.init}:0: has no sampled latents or no decoder LM; start --stage rl from an SFT "
            "run of --method atp"
        )

    # An option may repeat the numbers that SFT has settled, not change them
    for name in ("c", "K"):
        wanted = getattr(cfg, name)
        if name in cfg.given and wanted != saved[name]:
            raise UserError(
                f"command line: {flag(name)} {wanted} contradicts --init {cfg.init}, which has "
                f"{saved[name]}; drop the option"
            )


def check_latents(cfg):
    """SFT from a run that thinks already needs as many latents a step and no fewer steps.

    Otherwise it would have to learn them anew.

    Prints which heads are added or dropped. Raises UserError.
    """
    saved, wanted = read_switches(cfg.init), cfg.switches

    # A plain LLaMA, or a model at stage 0, does not think yet: any number will do
    if not saved.get("stage") or not cfg.latent:
        return

    # c has to be equal. K may grow: the later stages of the curriculum teach the added steps
    for name in ("c", "K"):
        fits = wanted["c"] == saved["c"] if name == "c" else wanted["K"] >= saved["K"]
        if not fits:
            raise UserError(
                f"command line: --init {cfg.init} thinks with {flag(name)} {saved[name]}, not "
                f"{wanted[name]}; give {flag(name)} {saved[name]}"
            )

    # Parts may be added and dropped, but perhaps the user did not mean to
    for name, what in (("vae", "VAE"), ("stop", "stop head"), ("decode", "decoder LM")):
        if saved[name] and not wanted[name]:
            print0(f"note: --init {cfg.init} has a {what}: it is dropped")
        elif wanted[name] and not saved[name]:
            print0(f"note: --init {cfg.init} has no {what}: it starts untrained")


def check_problems(cfg, splits, state):
    """Raise UserError if a resumed run would continue with other problems than it started with."""
    fingerprint = splits.fingerprint  # takes seconds for a large file

    # A run that starts records the hash in its state, which every checkpoint holds
    if state.setdefault("data", fingerprint) != fingerprint:
        raise UserError(
            f"{cfg.data or cfg.out}:0: the problems are not those that this run started with (was "
            "a file changed?); restore them, or start again in another --out"
        )


def check_start(cfg, start, state):
    """Raise UserError if --init no longer holds the model that an RL run started from."""
    if state["start"] != fingerprint(start):
        raise UserError(
            f"{cfg.init}:0: is not what this run started from (was it trained again?); restore "
            "it, or start again in another --out"
        )


def fingerprint(model):
    """A short hash of a model's parameters: of the first few numbers of each."""
    # Some numbers of each tensor are enough to notice a training, and quick to hash at 1B
    h = hashlib.sha256()
    for p in model.parameters():
        h.update(p.detach().flatten()[:64].cpu().numpy().tobytes())
    return h.hexdigest()[:16]


def refuse_rewards(reward, step, problems):
    """Raise NotFinite: some of the rewards (Q, G) are not finite."""
    # Name a problem if any of its G rewards is not finite
    bad = [p for p, ok in zip(problems, reward.isfinite().all(1).tolist()) if not ok]
    raise NotFinite(
        f"step {step + 1}: a reward is not finite, and nothing was changed; problems "
        f"{format_sources(bad)}"
    )


def format_sources(problems):
    """ "a.json:3,17 b.txt:5": where problems come from."""
    # Group the line numbers by file, so that each path is printed once
    lines = {}
    for p in problems:
        path, _, line = p.source.rpartition(":")
        lines.setdefault(path, []).append(line)
    return " ".join(f"{path}:{','.join(numbers)}" for path, numbers in lines.items())
