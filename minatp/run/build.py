"""A run's model: from --init, or untrained."""

import torch

from ..chain import read_prompt
from ..data import left_pad
from ..latent import ATP
from ..llama import LLAMA3_ROPE, LlamaConfig
from ..tokenizer import train_tokenizer
from . import distributed
from .huggingface import load_model, read_config, read_switches
from .saved import locate

# Problems whose states standardise a latent head, and the most ids of a prompt, its last ones
N_STANDARD = 64
LONGEST = 256


def build(cfg, problems):
    """(model, tokenizer): from cfg.init, or untrained, with a tokenizer learned from `problems`.

    The weights follow torch's global seed. Raises UserError.
    """
    if cfg.init:
        return build_from_init(cfg, problems)

    # From scratch: a tokenizer for these problems, and random weights for π
    tokenizer = train_tokenizer(problems, cfg.vocab_size)
    model = ATP(llama_config(cfg, len(tokenizer)), **cfg.switches)
    model.policy.init_weights()

    # φ starts as a copy of π's lower layers. train.py copies them once more, in stage 0
    if model.decode:
        model.decoder.start_from(model.policy)
    model.filler, model.end = tokenizer.latent, tokenizer.end
    return model, tokenizer


def build_from_init(cfg, problems):
    """`build` from a Hugging Face directory or an earlier run, which `check_init` has accepted."""
    # RL keeps the parts and the number of latents that SFT has settled
    if cfg.stage == "rl":
        return load_model(cfg.init)

    # SFT may choose others. A φ that has been trained stays as it is; a new one takes the lower
    # layers of π, all of them if there are fewer than the default
    directory, switches = locate(cfg.init), cfg.switches
    saved = read_switches(directory)
    if saved.get("decode"):
        del switches["decoder_layers"], switches["previews"]
    else:
        n_layer = read_config(directory / "config.json").n_layer
        switches["decoder_layers"] = min(switches["decoder_layers"], n_layer)
    model, tokenizer = load_model(directory, **switches)

    # Only previews that differ from problem to problem can be read
    if model.previews and model.vae and not saved.get("vae"):
        standardise_latent_head(model, tokenizer, problems)
    return model, tokenizer


@torch.no_grad()
def standardise_latent_head(model, tokenizer, problems):
    """Standardise an untrained latent head by π's hidden states after the first questions."""
    prompts = tokenizer.prompts([p.question for p in problems[:N_STANDARD]])
    prompts = left_pad([ids[-LONGEST:] for ids in prompts], model.end)
    h, _ = read_prompt(model.policy, *prompts, room=0)

    # All ranks take rank 0's states: the CPUs of several machines can differ
    model.latent_head.standardise(distributed.broadcast(h))


def llama_config(cfg, vocab_size):
    """The LlamaConfig of a model from scratch."""
    return LlamaConfig(
        vocab_size=vocab_size,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        n_kv_head=cfg.n_kv_head,
        n_embd=cfg.n_embd,
        n_inner=cfg.n_inner,
        head_dim=cfg.n_embd // cfg.n_head,
        block_size=cfg.block_size,
        rope_theta=cfg.rope_theta,
        rope_scaling=dict(LLAMA3_ROPE) if cfg.preset == "llama-1b" else None,
        # the ids that train_tokenizer gives to <|bos|> and <|eos|>
        bos=0,
        eos=(1,),
    )


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())
