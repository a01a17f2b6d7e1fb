"""Weights in and out: Hugging Face directories, and the checkpoints of a run. safetensors and JSON only; no pickle is ever loaded.

A saved model is a Hugging Face directory that other programs load; what they do not know (heads, decoder LM) lies in minatp/:
    DIR/config.json  model.safetensors  tokenizer.json  [tokenizer_config.json  generation_config.json]
    DIR/minatp/config.json  heads.safetensors  decoder.safetensors
A run's folder holds final/, such a directory, and checkpoints/: the same with optimizer.safetensors and state.json. Each has a
manifest.json, by which a broken checkpoint is known.
"""
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from . import distributed
from .config import NotWritten, UserError
from .data import Tokens
from .latent import ATP, START
from .llama import LlamaConfig

KEPT = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json")  # come with a tokenizer and go where it goes


def read_json(path):
    """The object in a JSON file. Raises UserError naming file and line."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}:0: cannot be read ({e.strerror}); is this a Hugging Face directory or a run's folder?")
    except (ValueError, RecursionError) as e:  # also bytes that are no text, and nesting without end
        raise UserError(f"{path}:{getattr(e, 'lineno', 1)}: is not valid JSON ({e}); the file may be truncated")
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
            raise UserError(f'{path}:1: "{name}" is missing; this does not look like a LLaMA\'s config.json')
        if not isinstance(value, (int, float) if kind is float else kind) or (kind is not bool and isinstance(value, bool)):
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
        raise UserError(f'{path}:1: RoPE of type {kind!r} is not supported; only default and llama3')
    missing = [k for k in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
               if kind == "llama3" and not (type(rope.get(k)) in (int, float) and 0 < rope[k] < 2**63)]
    if missing:
        raise UserError(f'{path}:1: the llama3 RoPE scaling lacks a positive number "{missing[0]}"')
    n_head, D = get("num_attention_heads", int), get("hidden_size", int)
    eos = get("eos_token_id", (int, list), -1)
    cfg = LlamaConfig(
        vocab_size=get("vocab_size", int), n_layer=get("num_hidden_layers", int), n_head=n_head,
        n_kv_head=get("num_key_value_heads", int, n_head), n_embd=D, n_inner=get("intermediate_size", int),
        head_dim=get("head_dim", int, D // n_head), block_size=get("max_position_embeddings", int, 2048),
        norm_eps=get("rms_norm_eps", float, 1e-6), rope_theta=float(theta), rope_scaling=rope if kind == "llama3" else None,
        tied=get("tie_word_embeddings", bool, False), bos=get("bos_token_id", int),
        eos=tuple(eos) if isinstance(eos, list) else (eos,))
    if not cfg.eos or not all(type(e) is int and 0 <= e for e in (cfg.bos, *cfg.eos)):
        raise UserError(f'{path}:1: "bos_token_id" must be a token id and "eos_token_id" one or a list of them, not {j["bos_token_id"]!r} '
                        f'and {j.get("eos_token_id")!r}')
    if max(cfg.bos, *cfg.eos) >= cfg.vocab_size:
        raise UserError(f'{path}:1: a bos or eos id is outside the vocabulary of {cfg.vocab_size}')
    if cfg.n_head % cfg.n_kv_head or cfg.head_dim % 2 or not cfg.head_dim:
        raise UserError(f"{path}:1: {cfg.n_head} heads cannot share {cfg.n_kv_head} key/value heads, or head_dim {cfg.head_dim} is odd")
    return cfg


def hf_config(cfg):
    """LlamaConfig -> the dict of a config.json in the spelling that every version of transformers and vLLM reads."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "attention_dropout": 0.0, "vocab_size": cfg.vocab_size, "hidden_size": cfg.n_embd,
        "intermediate_size": cfg.n_inner, "num_hidden_layers": cfg.n_layer, "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.n_kv_head, "head_dim": cfg.head_dim, "max_position_embeddings": cfg.block_size,
        "rms_norm_eps": cfg.norm_eps, "rope_theta": cfg.rope_theta, "rope_scaling": cfg.rope_scaling,
        "tie_word_embeddings": cfg.tied, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "float32",
        "bos_token_id": cfg.bos, "eos_token_id": list(cfg.eos) if len(cfg.eos) > 1 else cfg.eos[0],
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
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
            raise UserError(f'{index}:1: "weight_map" must map tensor names to files')
        files = [directory / Path(f).name for f in sorted(set(weight_map.values()))]
    tensors, home = {}, {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                for key in f.keys():
                    tensors[key], home[key] = f.get_tensor(key), file
        except OSError as e:
            raise UserError(f"{file}:0: cannot be read ({e.strerror or e}); is the download complete?")
        except SafetensorError as e:
            raise UserError(f"{file}:0: is not a whole safetensors file ({e}); is the download complete?")
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{home[key]}:0: tensor {key} holds NaN or infinity; the weights are broken")
    return tensors, files[0]


def fill(module, tensors, file):
    """Copy tensors into a module's parameters. A missing, extra or misshapen one is a UserError with name, shapes and file."""
    own = dict(module.named_parameters())
    for name, p in own.items():
        if name not in tensors:
            raise UserError(f"{file}:0: tensor {name} {tuple(p.shape)} is missing")
        if tensors[name].shape != p.shape:
            raise UserError(f"{file}:0: tensor {name} has shape {tuple(tensors[name].shape)}, but the config asks for {tuple(p.shape)}")
    if extra := sorted(set(tensors) - set(own)):
        raise UserError(f"{file}:0: tensor {extra[0]} {tuple(tensors[extra[0]].shape)} is not one of this model's ({len(extra)} such)")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])


def fill_llama(llama, directory, name="model"):
    tensors, file = read_tensors(directory, name)
    tensors = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}  # old files store what is computed
    if llama.cfg.tied:
        tensors.pop("lm_head.weight", None)
    fill(llama, tensors, file)


def read_tokens(directory, cfg):
    """The tokenizer.json of a directory as Tokens, with the three added tokens."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}:0: is missing; a model needs its tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises no narrower type
        raise UserError(f"{path}:1: is not a tokenizer ({e})")
    tokenizer.no_padding()  # a fine-tuned model's file can hold either
    tokenizer.no_truncation()
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= cfg.vocab_size:
        raise UserError(f"{path}:1: has a token {last}, but the embedding has only {cfg.vocab_size} rows")
    for token in (cfg.bos, *cfg.eos):
        if tokenizer.id_to_token(token) is None:
            raise UserError(f"{path}:1: has no token {token}, which config.json calls bos or eos")
    return Tokens(tokenizer, cfg.bos, cfg.eos, {n: (path.parent / n).read_bytes() for n in KEPT if (path.parent / n).is_file()})


# ---- models -------------------------------------------------------------------------------------------------------------

def add_tokens(model, tokens):
    """Give `model` (ATP) the three control tokens: a new row of the embeddings starts as a copy of the row of `<<`, or as the
    mean row if that is not one token."""
    source = tokens.encode("<<")
    source = source if len(source) == 1 else slice(None)
    for llama in [model.policy] + ([model.decoder] if model.decode else []):
        llama.add_rows([tokens.start, tokens.latent, tokens.end], source)
    model.end = tokens.end


def locate(directory):
    """Where the model of a directory lies: in a run's folder its final/, or its newest checkpoint. Raises UserError."""
    directory = Path(directory)
    if (directory / "final").is_dir():
        return directory / "final"
    if checkpoints(directory):
        return newest_checkpoint(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}:0: is not a directory; give a Hugging Face directory or the folder of a run, which --stage sft makes")
    if (directory / "metrics.jsonl").exists():
        raise UserError(f"{directory}:0: is a run that has saved nothing yet; wait for its first checkpoint, or start it again")
    return directory


def load(directory, **switches):
    """(model, tokens) of a Hugging Face directory, of a directory saved by `save`, or of a run's folder: its final/, or the newest
    checkpoint of a run that has not ended.

    switches (ATP's keyword arguments) win over what was saved with the heads. What a switch asks for and the directory lacks
    starts fresh: heads at their initial values, φ from π's weights. Raises UserError naming the file that is wrong.
    """
    directory, saved = locate(directory), switches_of(directory)
    cfg = read_config(directory / "config.json")
    tokens = read_tokens(directory, cfg)
    ours = directory / "minatp"
    later = {k: saved.pop(k) for k in ("stage", "longest") if k in saved}
    model = ATP(cfg, **saved | switches)
    for name, value in later.items():
        setattr(model, name, value)
    model.end = tokens.end
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
            part = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}
            if name not in ("policy", "decoder") and saved.get(switch.get(name), part):
                fill(head, part, file)
    if not knows_tokens(directory):
        add_tokens(model, tokens)
    return model, tokens


def switches_of(directory):
    """ATP's keyword arguments, the stage and the longest thought, as `save` wrote them into minatp/config.json; {} of a model that is not ours.
    Raises UserError."""
    path = locate(directory) / "minatp" / "config.json"
    if not path.parent.is_dir():
        return {}
    kinds = {"c": int, "K": int, "vae": bool, "stop": bool, "decode": bool, "stage": int, "longest": int, "decoder_layers": int}
    found = read_json(path)
    for name in kinds.keys() - {"longest", "decoder_layers"} | found.keys():
        if type(found.get(name)) is not kinds.get(name) or found[name] < (name in ("c", "K", "longest", "decoder_layers")):
            raise UserError(f'{path}:1: "{name}" is {found.get(name)!r}; this file is written with the model and not by hand')
    return found


def knows_tokens(directory):
    """Whether the directory's tokenizer had the control tokens already."""
    return START in (directory / "tokenizer.json").read_text(encoding="utf-8")


def save(directory, model, tokens):
    """Write the directory described above."""
    directory, ours = Path(directory), Path(directory) / "minatp"
    ours.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(model.policy.cfg), indent=2) + "\n")
    cpu = lambda m, prefix="": {prefix + k: p.detach().cpu().contiguous() for k, p in m.named_parameters()}
    save_file(cpu(model.policy), directory / "model.safetensors", metadata={"format": "pt"})
    tokens.tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in tokens.files.items():
        (directory / name).write_bytes(content)
    eos = list(tokens.eos) if len(tokens.eos) > 1 else tokens.eos[0]
    for name, text in (("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                                                  "bos_token": tokens.tokenizer.id_to_token(tokens.bos),
                                                  "eos_token": tokens.tokenizer.id_to_token(tokens.eos[0])}),
                       ("generation_config.json", {"bos_token_id": tokens.bos, "eos_token_id": eos})):
        if name not in tokens.files:
            (directory / name).write_text(json.dumps(text, indent=2) + "\n")
    ours_config = {"c": model.c, "K": model.K, "vae": model.vae, "stop": model.stop, "decode": model.decode,
                   "stage": model.stage, "longest": model.longest}
    if model.decode:
        ours_config["decoder_layers"] = model.decoder.cfg.n_layer
        save_file(cpu(model.decoder), ours / "decoder.safetensors")
    (ours / "config.json").write_text(json.dumps(ours_config, indent=2) + "\n")
    heads = [cpu(m, name + ".") for name, m in model.named_children() if name not in ("policy", "decoder")]
    save_file({k: v for head in heads for k, v in head.items()}, ours / "heads.safetensors")


# ---- checkpoints of a run -----------------------------------------------------------------------------------------------

def n_bytes(model, optimizer=None):
    """Bytes on disk of a model's parameters and of the optimizer's moments, with a MiB for the tokenizer, JSON and half-filled blocks."""
    moments = (v for state in optimizer.state.values() for v in state.values()) if optimizer else ()
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *moments)) + 2**20


def write_folder(path, write, needed):
    """Make the folder `path` all at once: write(tmp) fills a temporary one, which gets manifest.json (the SHA-256 of every file), is
    fsynced and renamed. An older folder of that name is replaced only then.

    Raises NotWritten where that fails, which tells the `needed` bytes; what was there before is still there.
    """
    path = Path(path)
    tmp, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        write(tmp)
        hashes = {str(file.relative_to(tmp)): sha256(file) for file in sorted(tmp.rglob("*")) if file.is_file()}
        (tmp / "manifest.json").write_text(json.dumps({"sha256": hashes}, indent=2) + "\n")
        for file in [*tmp.rglob("*"), tmp]:
            fsync(file)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        tmp.rename(path)
        for parent in (path.parent, path.parent.parent):  # the names, too, must outlive a power cut
            fsync(parent)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(tmp, ignore_errors=True)
        raise NotWritten(path, e, needed)
    shutil.rmtree(old, ignore_errors=True)


def fsync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def sha256(path):
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def fault(folder):
    """What is wrong with a folder that write_folder made, in words; None where it is whole."""
    try:
        hashes = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["sha256"]
        changed = [name for name, h in hashes.items() if sha256(folder / name) != h]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        return f"its manifest or a file of it cannot be read: {e}"
    return f"{changed[0]} is not what was written" if changed else None


def save_final(out, model, tokens):
    """out/final: the directory that `save` writes, by rank 0 alone. Raises NotWritten."""
    if distributed.rank():
        return
    write_folder(Path(out) / "final", lambda tmp: save(tmp, model, tokens), n_bytes(model))


def save_checkpoint(out, state, model, tokens, optimizer, keep=2):
    """out/checkpoints/{step}: the directory that `save` writes, the optimizer's moments and `state` (JSON: step, seconds …).

    The last `keep` are kept; older ones are removed, and newer ones, which a resume has found broken; what has another name, say a
    copy that a user made, stays. A checkpoint serves --init and sample.py as well as --resume. Rank 0 alone writes. Raises NotWritten.
    """
    if distributed.rank():
        return

    def write(tmp):
        save(tmp, model, tokens)
        save_file({f"{n}/{k}": v.cpu().contiguous() for n, p in model.named_parameters()
                   for k, v in optimizer.state.get(p, {}).items()}, tmp / "optimizer.safetensors")
        (tmp / "state.json").write_text(json.dumps(state) + "\n")

    new = Path(out) / "checkpoints" / f"{state['step']:08d}"
    write_folder(new, write, n_bytes(model, optimizer))
    kept = [c for c in checkpoints(out) if c <= new][-keep:]
    ours = {c for c in new.parent.iterdir() if re.fullmatch(r"\d{8}(\.tmp|\.old)?", c.name) and c.is_dir()}
    for other in sorted(ours - set(kept), reverse=True):  # what a crash left of a name, then the name
        shutil.rmtree(other if other.suffix else other.rename(other.with_suffix(".old")))  # never half a checkpoint


def checkpoints(out):
    """Folders of a run's checkpoints, oldest first."""
    return sorted((Path(out) / "checkpoints").glob("[0-9]" * 8))


def newest_checkpoint(out):
    """Folder of a run's newest whole checkpoint; of each broken one there is a warning on stderr. Raises UserError where none is."""
    found = checkpoints(out)
    for folder in reversed(found):
        wrong = fault(folder)
        if not wrong:
            return folder
        sys.stderr.write(f"warning: {folder}: is broken ({wrong}); the one before it is used\n")
    if found:
        raise UserError(f"{out}/checkpoints:0: no checkpoint is whole; start anew in another --out")
    raise UserError(f"{out}/checkpoints:0: holds no checkpoint to resume from; start without --resume")


def restore(folder, model, optimizer):
    """Put the moments of a checkpoint's folder into optimizer; returns the checkpoint's state. Raises UserError."""
    moments, file = read_tensors(folder, "optimizer")
    for n, p in model.named_parameters():
        mine = {k: moments.pop(f"{n}/{k}") for k in ("step", "exp_avg", "exp_avg_sq", "momentum") if f"{n}/{k}" in moments}
        if mine:
            optimizer.state[p] = {k: v.to(p.device) for k, v in mine.items()}  # the step as well: fused AdamW counts on the device
    if moments:
        raise UserError(f"{file}:0: tensor {min(moments)} belongs to no parameter of this model; the checkpoint is of another run")
    return read_json(Path(folder) / "state.json")
