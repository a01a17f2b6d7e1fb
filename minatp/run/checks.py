"""What a run refuses: an --init that does not fit the options, changed problems, bad rewards."""

import hashlib
from dataclasses import fields

from .errors import NotFinite, UserError
from .huggingface import read_config, read_switches
from .options import Size, flag
from .saved import locate
from .terminal import print0


def check_init(cfg):
    """Raise UserError if an option contradicts the model of --init. No weights are read.

    Every option is taken, refused here, or has no effect, which --help then says. Prints which
    parts of --init are dropped, and which it lacks.
    """
    directory = locate(cfg.init)
    llama, saved = read_config(directory / "config.json"), read_switches(directory)
    if cfg.stage == "rl":
        check_thoughts(cfg, saved)
    else:
        check_latents(cfg, saved)
    check_size(cfg, llama)
    check_decoder(cfg, llama, saved)
    check_latent_head(cfg, saved)


def contradiction(cfg, name, has):
    """The UserError for an option that asks for something else than --init has."""
    return UserError(
        f"command line: {flag(name)} {getattr(cfg, name)} contradicts --init {cfg.init}, which has "
        f"{has}; drop the option"
    )


def check_size(cfg, llama):
    """Raise UserError if an option asks for another policy than --init has, a LlamaConfig."""
    # Only the command line can contradict --init: a default gives way
    for f in fields(Size):
        if f.name not in cfg.given or f.name == "decoder_layers":
            continue
        has, wanted = getattr(llama, f.name), getattr(cfg, f.name)

        # --vocab-size is the most tokens that a tokenizer may have; --init brings its own
        fits = has <= wanted if f.name == "vocab_size" else has == wanted
        if not fits:
            raise contradiction(cfg, f.name, has)


def check_decoder(cfg, llama, saved):
    """Raise UserError if an option asks for another start or depth of φ than it can have."""
    if not cfg.switches["decode"]:
        return

    # A φ that has been trained does not start again. Previews belong to stage 0
    if saved.get("decode"):
        has = "previews" if saved.get("previews") else "copy"
        if "decoder_start" in cfg.given and cfg.decoder_start != has:
            raise contradiction(cfg, "decoder_start", has)
    elif cfg.decoder_start == "previews" and not cfg.has_stage_0:
        print0("note: there is no stage 0, so --decoder-start previews means copy")
    if "decoder_layers" not in cfg.given:
        return

    # A φ that has been trained keeps its depth
    wanted = cfg.decoder_layers or llama.n_layer
    has = saved.get("decoder_layers", llama.n_layer)
    if saved.get("decode") and wanted != has:
        raise contradiction(cfg, "decoder_layers", has)

    # A new one starts from the lower layers of π
    if wanted > llama.n_layer:
        raise UserError(
            f"command line: --decoder-layers {wanted} must be at most {llama.n_layer}, the layers "
            f"of --init {cfg.init}: φ starts from π's lower layers"
        )


def check_latent_head(cfg, saved):
    """Raise UserError if an option asks for the σ of an untrained head, and the head is trained."""
    if "init_logvar" in cfg.given and cfg.switches["vae"] and saved.get("vae"):
        raise UserError(
            f"command line: --init-logvar is for an untrained latent head, and --init {cfg.init} "
            "has a trained one; drop the option"
        )


def check_thoughts(cfg, saved):
    """RL explores in sampled latents, whose number SFT has settled, and rewards what φ reads.

    saved: what `read_switches` says of --init. Raises UserError if it has none of them, or an
    option asks for another number.
    """
    # Stage 0 will not do: there all reasoning is still text
    if not (saved.get("vae") and saved.get("decode") and saved.get("stage")):
        raise UserError(
            f"{cfg.init}:0: has no sampled latents or no decoder LM; start --stage rl from an SFT "
            "run of --method atp"
        )

    # With path latents are no actions. Without words and stops the reward teaches nothing. (A run
    # of an earlier version may go on: its anchor does)
    if cfg.estimator == "path" and cfg.greedy and not saved.get("stop") and not cfg.resume:
        raise UserError(
            f"command line: --greedy with --estimator path learns from stops alone, and --init "
            f"{cfg.init} has no stop head; drop --greedy, or give --estimator score"
        )

    # An option may repeat the numbers that SFT has settled, not change them
    for name in ("c", "K"):
        if name in cfg.given and getattr(cfg, name) != saved[name]:
            raise contradiction(cfg, name, saved[name])


def check_latents(cfg, saved):
    """SFT from a run that thinks already needs as many latents a step and no fewer steps.

    Otherwise it would have to learn them anew.

    saved: what `read_switches` says of --init. Prints which parts are added or dropped. Raises
    UserError.
    """
    wanted = cfg.switches

    # c has to be equal. K may grow: the later stages of the curriculum teach the added steps. A
    # plain LLaMA, or a model at stage 0, does not think yet, and one with something else in place
    # of its steps thinks otherwise: any number will do
    in_place = replacement(wanted)
    if saved.get("stage") and cfg.replaces_steps and replacement(saved) == in_place:
        has_other_c = wanted["c"] != saved["c"] and in_place != "nothing"
        if has_other_c or wanted["K"] < saved["K"]:
            name = "c" if has_other_c else "K"
            raise UserError(
                f"command line: --init {cfg.init} thinks with {flag(name)} {saved[name]}, not "
                f"{wanted[name]}; give {flag(name)} {saved[name]}"
            )

    # Parts may be added and dropped, but perhaps the user did not mean to. A plain LLaMA has none
    parts = (
        ("vae", "VAE"),
        ("stop", "stop head"),
        ("decode", "decoder LM"),
        ("project", "projection"),
    )
    for name, what in parts:
        has = saved.get(name, False)
        if has and not wanted[name]:
            print0(f"note: --init {cfg.init} has a {what}: it is dropped")
        elif saved and wanted[name] and not has:
            print0(f"note: --init {cfg.init} has no {what}: it starts untrained")


def replacement(switches):
    """What a model with these switches has in place of written steps."""
    fillers = switches.get("fillers")
    if fillers is None:
        return "latents"
    return "fillers" if fillers else "nothing"


def check_problems(cfg, splits, state):
    """Raise UserError if a resumed run would continue with other problems than it started with."""
    digest = splits.fingerprint  # takes seconds for a large file

    # A run that starts records the hash in its state, which every checkpoint holds
    if state.setdefault("data", digest) != digest:
        raise UserError(
            f"{cfg.data or cfg.out}:0: the problems are not those that this run started with (was "
            "a file changed, or the order of several?); restore them, or start again in another "
            "--out"
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
        f"step {step + 1}: a reward is not finite, so the step was not taken; problems "
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
