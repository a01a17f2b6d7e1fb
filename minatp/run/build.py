"""A run's model: from --init, or untrained."""

from ..latent import ATP
from ..llama import LLAMA3_ROPE, LlamaConfig
from ..tokenizer import train_tokenizer
from .checks import check_latents, check_size, check_thoughts
from .huggingface import load_model


def build(cfg, problems):
    """(model, tokenizer): from cfg.init, or untrained, with a tokenizer learned from `problems`.

    The weights follow torch's global seed. Raises UserError.
    """
    if cfg.init:
        return build_from_init(cfg)

    # From scratch: a tokenizer for these problems, and random weights for π
    tokenizer = train_tokenizer(problems, cfg.vocab_size)
    model = ATP(llama_config(cfg, len(tokenizer)), **cfg.switches)
    model.policy.init_weights()

    # φ starts as a copy of π's lower layers. train.py copies π once more, after stage 0
    if model.decode:
        model.decoder.start_from(model.policy)
    model.end = tokenizer.end
    return model, tokenizer


def build_from_init(cfg):
    """`build` from a Hugging Face directory or an earlier run."""
    # RL keeps the parts and the number of latents that SFT has settled. SFT may choose others; only
    # the depth of φ is always that of --init, or that of π if --init has no φ
    switches = {}
    if cfg.stage == "rl":  # takes the model as it is
        check_thoughts(cfg)
    else:
        check_latents(cfg)
        switches = {name: value for name, value in cfg.switches.items() if name != "decoder_layers"}
    model, tokenizer = load_model(cfg.init, **switches)
    check_size(model, cfg)
    return model, tokenizer


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
