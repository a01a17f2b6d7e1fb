"""Hugging Face directories."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
import tokenizers

from ..latent import ATP
from ..llama import LlamaConfig
from ..tokenizer import START, Tokenizer
from .errors import UserError
from .saved import locate

KEPT = (
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
)  # come with a tokenizer and go where it goes


def read_json(path):
    """The object in a JSON file. Raises UserError naming file and line."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(
            f"{path}:0: cannot be read ({e.strerror}); is this a Hugging Face directory or a run's folder?"
        )
    except (
        ValueError,
        RecursionError,
    ) as e:  # also bytes that are no text, and nesting without end
        raise UserError(
            f"{path}:{getattr(e, 'lineno', 1)}: is not valid JSON ({e}); the file may be truncated"
        )
    if not isinstance(value, dict):
        raise UserError(f"{path}:1: must be a JSON object, not {type(value).__name__}")
    return value


# ---- config.json --------------------------------------------------------------------------------------------------------


def read_config(path):
    """A LLaMA config.json, either spelling of RoPE (rope_theta + rope_scaling, or rope_parameters) -> LlamaConfig."""
    j = read_json(path)

    def get(name, kind, default=None):
        value = j.get(name, default)
        if value is None and default is None:
            raise UserError(
                f'{path}:1: "{name}" is missing; this does not look like a LLaMA\'s config.json'
            )
        if not isinstance(value, (int, float) if kind is float else kind) or (
            kind is not bool and isinstance(value, bool)
        ):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise UserError(f'{path}:1: "{name}" must be {names}, not {value!r}')
        if kind in (int, float) and not 0 < value < 2**31 and not name.endswith("token_id"):
            raise UserError(f'{path}:1: "{name}" must be positive, and below 2^31, not {value!r}')
        return float(value) if kind is float else value

    if j.get("model_type", "llama") != "llama":
        raise UserError(f'{path}:1: "model_type" is {j["model_type"]!r}; only llama can be loaded')
    for name, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if j.get(name, expected) != expected:
            raise UserError(f'{path}:1: "{name}" is {j[name]!r}; only {expected!r} is supported')
    rope = j.get("rope_parameters") or j.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}:1: the parameters of RoPE must be an object, not {rope!r}")
    rope = dict(rope)
    theta = rope.pop("rope_theta", None) or j.get("rope_theta") or 10000.0
    if type(theta) not in (int, float) or not 0 < theta < 2**63:
        raise UserError(f'{path}:1: "rope_theta" must be a positive number, not {theta!r}')
    kind = rope.get("rope_type", rope.pop("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(
            f"{path}:1: RoPE of type {kind!r} is not supported; only default and llama3"
        )
    missing = [
        k
        for k in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        if kind == "llama3" and not (type(rope.get(k)) in (int, float) and 0 < rope[k] < 2**63)
    ]
    if missing:
        raise UserError(f'{path}:1: the llama3 RoPE scaling lacks a positive number "{missing[0]}"')
    n_head, D = get("num_attention_heads", int), get("hidden_size", int)
    eos = get("eos_token_id", (int, list), -1)
    cfg = LlamaConfig(
        vocab_size=get("vocab_size", int),
        n_layer=get("num_hidden_layers", int),
        n_head=n_head,
        n_kv_head=get("num_key_value_heads", int, n_head),
        n_embd=D,
        n_inner=get("intermediate_size", int),
        head_dim=get("head_dim", int, D // n_head),
        block_size=get("max_position_embeddings", int, 2048),
        norm_eps=get("rms_norm_eps", float, 1e-6),
        rope_theta=float(theta),
        rope_scaling=rope if kind == "llama3" else None,
        tied=get("tie_word_embeddings", bool, False),
        bos=get("bos_token_id", int),
        eos=tuple(eos) if isinstance(eos, list) else (eos,),
    )
    if not cfg.eos or not all(type(e) is int and 0 <= e for e in (cfg.bos, *cfg.eos)):
        raise UserError(
            f'{path}:1: "bos_token_id" must be a token id and "eos_token_id" one or a list of them, not {j["bos_token_id"]!r} '
            f"and {j.get('eos_token_id')!r}"
        )
    if max(cfg.bos, *cfg.eos) >= cfg.vocab_size:
        raise UserError(f"{path}:1: a bos or eos id is outside the vocabulary of {cfg.vocab_size}")
    if cfg.n_head % cfg.n_kv_head or cfg.head_dim % 2 or not cfg.head_dim:
        raise UserError(
            f"{path}:1: {cfg.n_head} heads cannot share {cfg.n_kv_head} key/value heads, or head_dim {cfg.head_dim} is odd"
        )
    return cfg


def hf_config(cfg):
    """LlamaConfig -> the dict of a config.json in the spelling that every version of transformers and vLLM reads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.n_embd,
        "intermediate_size": cfg.n_inner,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.n_kv_head,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.block_size,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": cfg.rope_scaling,
        "tie_word_embeddings": cfg.tied,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "float32",
        "bos_token_id": cfg.bos,
        "eos_token_id": list(cfg.eos) if len(cfg.eos) > 1 else cfg.eos[0],
    }


# ---- tensors ------------------------------------------------------------------------------------------------------------


def read_tensors(directory, name="model"):
    """(tensors, file of each) of `name`.safetensors, or of the shards that `name`.safetensors.index.json lists."""
    directory = Path(directory)
    index = directory / f"{name}.safetensors.index.json"
    if (directory / f"{name}.safetensors").exists() or not index.exists():
        files = [directory / f"{name}.safetensors"]
    else:
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(f, str) for f in weight_map.values())
        ):
            raise UserError(f'{index}:1: "weight_map" must map tensor names to files')
        files = [directory / Path(f).name for f in sorted(set(weight_map.values()))]
    tensors, home = {}, {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                for key in f.keys():
                    tensors[key], home[key] = f.get_tensor(key), file
        except OSError as e:
            raise UserError(
                f"{file}:0: cannot be read ({e.strerror or e}); is the download complete?"
            )
        except SafetensorError as e:
            raise UserError(
                f"{file}:0: is not a whole safetensors file ({e}); is the download complete?"
            )
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(
                f"{home[key]}:0: tensor {key} holds NaN or infinity; the weights are broken"
            )
    return tensors, files[0]


def fill(module, tensors, file):
    """Copy tensors into a module's parameters. A missing, extra or misshapen one is a UserError with name, shapes and file."""
    own = dict(module.named_parameters())
    for name, p in own.items():
        if name not in tensors:
            raise UserError(f"{file}:0: tensor {name} {tuple(p.shape)} is missing")
        if tensors[name].shape != p.shape:
            raise UserError(
                f"{file}:0: tensor {name} has shape {tuple(tensors[name].shape)}, but the config asks for {tuple(p.shape)}"
            )
    if extra := sorted(set(tensors) - set(own)):
        raise UserError(
            f"{file}:0: tensor {extra[0]} {tuple(tensors[extra[0]].shape)} is not one of this model's ({len(extra)} such)"
        )
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])


def fill_llama(llama, directory, name="model"):
    tensors, file = read_tensors(directory, name)
    tensors = {
        k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")
    }  # old files store what is computed
    if llama.cfg.tied:
        tensors.pop("lm_head.weight", None)
    fill(llama, tensors, file)


def read_tokenizer(directory, cfg):
    """The tokenizer.json of a directory as Tokens, with the three added tokens."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}:0: is missing; a model needs its tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises no narrower type
        raise UserError(f"{path}:1: is not a tokenizer ({e})")
    backend.no_padding()  # a fine-tuned model's file can hold either
    backend.no_truncation()
    last = max(backend.get_vocab().values(), default=-1)
    if last >= cfg.vocab_size:
        raise UserError(
            f"{path}:1: has a token {last}, but the embedding has only {cfg.vocab_size} rows"
        )
    for token in (cfg.bos, *cfg.eos):
        if backend.id_to_token(token) is None:
            raise UserError(f"{path}:1: has no token {token}, which config.json calls bos or eos")
    return Tokenizer(
        backend,
        cfg.bos,
        cfg.eos,
        {n: (path.parent / n).read_bytes() for n in KEPT if (path.parent / n).is_file()},
    )


# ---- models -------------------------------------------------------------------------------------------------------------


def add_control_tokens(model, tokenizer):
    """Give `model` (ATP) the three control tokens: a new row of the embeddings starts as a copy of the row of `<<`, or as the
    mean row if that is not one token."""
    source = tokenizer.encode("<<")
    source = source if len(source) == 1 else slice(None)
    for llama in [model.policy] + ([model.decoder] if model.decode else []):
        llama.add_rows([tokenizer.start, tokenizer.latent, tokenizer.end], source)
    model.end = tokenizer.end


def load_model(directory, **switches):
    """(model, tokens) of a Hugging Face directory, of a directory saved by `save`, or of a run's folder: its final/, or the newest
    checkpoint of a run that has not ended.

    switches (ATP's keyword arguments) win over what was saved with the heads. What a switch asks for and the directory lacks
    starts fresh: heads at their initial values, φ from π's weights. Raises UserError naming the file that is wrong.
    """
    directory, saved = locate(directory), read_switches(directory)
    cfg = read_config(directory / "config.json")
    tokenizer = read_tokenizer(directory, cfg)
    ours = directory / "minatp"
    later = {k: saved.pop(k) for k in ("stage", "longest") if k in saved}
    model = ATP(cfg, **saved | switches)
    for name, value in later.items():
        setattr(model, name, value)
    model.end = tokenizer.end
    fill_llama(model.policy, directory)
    if model.decode:
        if saved.get("decode"):
            fill_llama(model.decoder, ours, "decoder")
        else:
            model.decoder.start_from(model.policy)
    if saved:
        tensors, file = read_tensors(ours, "heads")
        switch = {"latent_head": "vae", "stop_head": "stop"}  # those of a reader's own have none
        for name, head in model.named_children():
            part = {
                k.removeprefix(name + "."): v
                for k, v in tensors.items()
                if k.startswith(name + ".")
            }
            if name not in ("policy", "decoder") and saved.get(switch.get(name), part):
                fill(head, part, file)
    if not has_control_tokens(directory):
        add_control_tokens(model, tokenizer)
    return model, tokenizer


def read_switches(directory):
    """ATP's keyword arguments, the stage and the longest thought, as `save` wrote them into minatp/config.json; {} of a model that is not ours.
    Raises UserError."""
    path = locate(directory) / "minatp" / "config.json"
    if not path.parent.is_dir():
        return {}
    kinds = {
        "c": int,
        "K": int,
        "vae": bool,
        "stop": bool,
        "decode": bool,
        "stage": int,
        "longest": int,
        "decoder_layers": int,
    }
    found = read_json(path)
    for name in kinds.keys() - {"longest", "decoder_layers"} | found.keys():
        if type(found.get(name)) is not kinds.get(name) or found[name] < (
            name in ("c", "K", "longest", "decoder_layers")
        ):
            raise UserError(
                f'{path}:1: "{name}" is {found.get(name)!r}; this file is written with the model and not by hand'
            )
    return found


def has_control_tokens(directory):
    """Whether the directory's tokenizer had the control tokens already."""
    return START in (directory / "tokenizer.json").read_text(encoding="utf-8")


def save_model(directory, model, tokenizer):
    """Write the directory described above."""
    directory, ours = Path(directory), Path(directory) / "minatp"
    ours.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(model.policy.cfg), indent=2) + "\n")
    cpu = lambda m, prefix="": {
        prefix + k: p.detach().cpu().contiguous() for k, p in m.named_parameters()
    }
    save_file(cpu(model.policy), directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    for name, content in tokenizer.files.items():
        (directory / name).write_bytes(content)
    eos = list(tokenizer.eos) if len(tokenizer.eos) > 1 else tokenizer.eos[0]
    for name, text in (
        (
            "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "bos_token": tokenizer.backend.id_to_token(tokenizer.bos),
                "eos_token": tokenizer.backend.id_to_token(tokenizer.eos[0]),
            },
        ),
        ("generation_config.json", {"bos_token_id": tokenizer.bos, "eos_token_id": eos}),
    ):
        if name not in tokenizer.files:
            (directory / name).write_text(json.dumps(text, indent=2) + "\n")
    ours_config = {
        "c": model.c,
        "K": model.K,
        "vae": model.vae,
        "stop": model.stop,
        "decode": model.decode,
        "stage": model.stage,
        "longest": model.longest,
    }
    if model.decode:
        ours_config["decoder_layers"] = model.decoder.cfg.n_layer
        save_file(cpu(model.decoder), ours / "decoder.safetensors")
    (ours / "config.json").write_text(json.dumps(ours_config, indent=2) + "\n")
    heads = [
        cpu(m, name + ".")
        for name, m in model.named_children()
        if name not in ("policy", "decoder")
    ]
    save_file({k: v for head in heads for k, v in head.items()}, ours / "heads.safetensors")
