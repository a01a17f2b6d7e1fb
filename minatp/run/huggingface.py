"""Models in and out of Hugging Face directories: safetensors and JSON only, never a pickle.

A saved model is a directory that other programs can load. The parts that they do not know, the
heads and the decoder, are in minatp/:

    DIR/           config.json  model.safetensors  tokenizer.json
                   tokenizer_config.json  generation_config.json
    DIR/minatp/    config.json  heads.safetensors  decoder.safetensors

A directory without minatp/ is a plain LLaMA, which gets new heads. saved.py writes such directories
safely; checkpoint.py adds the state of the optimizer.
"""

import json
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..latent import ATP
from ..llama import LlamaConfig
from ..tokenizer import START, Tokenizer
from .errors import UserError
from .saved import locate

# The dtypes of weights, as safetensors names them. Integers and 8 bits are codes of quantised
# weights, which mean nothing without their scales
DTYPES = ("F64", "F32", "F16", "BF16")
DEQUANTISE = "dequantise the model first (in transformers: dequantize, then save_pretrained)"

# Files that belong to a tokenizer: a model that is saved again keeps them. (Other forms of the
# vocabulary, such as tokenizer.model, are left behind: they lack the control tokens)
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_CONFIG,
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
CHAT_TEMPLATES = "additional_chat_templates"  # a folder with further chat templates


def read_json(path):
    """Return the object in a JSON file. Raises UserError with file and line."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(
            f"{path}:0: cannot be read ({e.strerror}); is this a Hugging Face directory or a run's "
            "folder?"
        ) from None
    except (ValueError, RecursionError) as e:  # not JSON, not UTF-8, or nested too deeply
        line = getattr(e, "lineno", 1)
        raise UserError(
            f"{path}:{line}: is not valid JSON ({e}); the file may be truncated"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}:1: must be a JSON object, not {type(value).__name__}")
    return value


# ---- config.json ---------------------------------------------------------------------------------


class ConfigFile:
    """A config.json whose fields are checked when they are read. The methods raise UserError."""

    def __init__(self, path):
        self.path = path
        self.fields = read_json(path)

    def error(self, text):
        """A UserError about this file."""
        return UserError(f"{self.path}:1: {text}")

    def field(self, name, default):
        """The value of a field, whatever its type. A field without a default must be there."""
        value = self.fields.get(name)
        if value is None:  # null is as absent
            value = default
        if value is None:
            raise self.error(f'"{name}" is missing; add it, or give the directory of a LLaMA')
        return value

    def require(self, name, value, types):
        """Check the type of a value. To Python True is an int; here it is not."""
        is_wrong_bool = isinstance(value, bool) and bool not in types
        if is_wrong_bool or not isinstance(value, types):
            names = " or ".join(t.__name__ for t in types)
            raise self.error(f'"{name}" must be {names}, not {value!r}')

    def require_positive(self, name, value):
        if not 0 < value < 2**31:
            raise self.error(f'"{name}" must be positive, and below 2^31, not {value!r}')

    # The value of a field, by its type. Without a default the field must be in the file
    def boolean(self, name, default):
        value = self.field(name, default)
        self.require(name, value, (bool,))
        return value

    def size(self, name, default=None):
        """A positive int."""
        value = self.field(name, default)
        self.require(name, value, (int,))
        self.require_positive(name, value)
        return value

    def number(self, name, default):
        """A positive float; an int will do."""
        value = self.field(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            self.require(name, value, (float,))
        self.require_positive(name, value)
        return float(value)

    def token_id(self, name):
        value = self.field(name, None)
        self.require(name, value, (int,))
        return value

    def token_ids(self, name):
        """One id or a list of ids -> tuple."""
        value = self.field(name, -1)
        self.require(name, value, (int, list))
        return tuple(value) if isinstance(value, list) else (value,)


def read_config(path):
    """Read a LLaMA's config.json -> LlamaConfig. Raises UserError if llama.py cannot compute it."""
    file = ConfigFile(path)

    # Refuse what llama.py would compute differently, before the sizes are read
    check_architecture(file)
    rope_theta, rope_scaling = read_rope(file)

    # Optional fields have the defaults of transformers
    n_head = file.size("num_attention_heads")
    n_embd = file.size("hidden_size")
    eos = file.token_ids("eos_token_id")
    cfg = LlamaConfig(
        vocab_size=file.size("vocab_size"),
        n_layer=file.size("num_hidden_layers"),
        n_head=n_head,
        n_kv_head=file.size("num_key_value_heads", n_head),
        n_embd=n_embd,
        n_inner=file.size("intermediate_size"),
        head_dim=file.size("head_dim", n_embd // n_head),
        block_size=file.size("max_position_embeddings", 2048),
        norm_eps=file.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied=file.boolean("tie_word_embeddings", False),
        bos=file.token_id("bos_token_id"),
        eos=eos,
    )

    # Fields that are valid each by itself must also fit together
    check_token_ids(file, cfg)
    check_heads(file, cfg)
    return cfg


def check_architecture(file):
    """Raise UserError if the model is no LLaMA, or one with parts that llama.py lacks."""
    model_type = file.field("model_type", "llama")
    if model_type != "llama":
        raise file.error(f'"model_type" is {model_type!r}; only llama can be loaded')
    if file.field("quantization_config", {}):
        raise file.error(f'"quantization_config": the weights are quantised; {DEQUANTISE}')

    # What llama.py computes is also what a missing field means in transformers
    supported = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
    }
    for name, expected in supported.items():
        value = file.field(name, expected)
        if value != expected:
            raise file.error(f'"{name}" is {value!r}; only {expected!r} is supported')


def read_rope(file):
    """Return (theta, the parameters of the llama3 scaling or None) of RoPE."""
    # Older files have rope_theta and rope_scaling; since transformers 5 rope_parameters holds both.
    # A file with both spellings is read as transformers reads it
    rope = file.fields.get("rope_scaling") or file.fields.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise file.error(f"the parameters of RoPE must be an object, not {rope!r}")
    rope = {name: value for name, value in rope.items() if value is not None}

    theta = rope.pop("rope_theta", file.field("rope_theta", 10000.0))
    if not is_positive_number(theta):
        raise file.error(f'"rope_theta" must be a positive number, not {theta!r}')
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise file.error('RoPE with a "partial_rotary_factor" other than 1.0 is not supported')

    # The type has an older name, too
    type_by_older_name = rope.pop("type", "default")
    rope_type = rope.setdefault("rope_type", type_by_older_name)
    if rope_type not in ("default", "llama3"):
        raise file.error(
            f"RoPE of type {rope_type!r} is not supported; only default and llama3 are"
        )
    if rope_type == "default":
        return float(theta), None

    # rope_frequencies in llama.py divides by all of these
    required = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
    for name in required:
        if not is_positive_number(rope.get(name)):
            raise file.error(f'the llama3 scaling of RoPE needs a positive number "{name}"')
    return float(theta), rope


def is_positive_number(value):
    return type(value) in (int, float) and 0 < value < 2**63


def check_token_ids(file, cfg):
    """Raise UserError if bos or eos is not in the vocabulary."""
    # The entries of a list are not checked so far. (`type`: to isinstance, True is an int)
    ids = (cfg.bos, *cfg.eos)
    all_valid = all(type(token) is int and token >= 0 for token in ids)
    if not cfg.eos or not all_valid:
        bos, eos = file.fields["bos_token_id"], file.fields.get("eos_token_id")
        raise file.error(
            '"bos_token_id" must be a token id and "eos_token_id" one or a list of them, '
            f"not {bos!r} and {eos!r}"
        )
    if max(ids) >= cfg.vocab_size:
        raise file.error(f"a bos or eos id is outside the vocabulary of {cfg.vocab_size}")


def check_heads(file, cfg):
    """Raise UserError if the attention heads cannot be grouped, or RoPE cannot rotate them."""
    has_equal_groups = cfg.n_head % cfg.n_kv_head == 0
    has_even_dim = cfg.head_dim > 0 and cfg.head_dim % 2 == 0  # RoPE rotates pairs
    if not has_equal_groups or not has_even_dim:
        raise file.error(
            f"{cfg.n_head} heads cannot share {cfg.n_kv_head} key/value heads, or head_dim "
            f"{cfg.head_dim} is odd"
        )


def hf_config(cfg):
    """LlamaConfig -> the dict of a config.json."""
    return {
        # What the architecture fixes
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        # Sizes
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.n_embd,
        "intermediate_size": cfg.n_inner,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.n_kv_head,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.block_size,
        # Details
        "rms_norm_eps": cfg.norm_eps,
        # the older spelling of RoPE, which all versions of transformers and vLLM can read
        "rope_theta": cfg.rope_theta,
        "rope_scaling": cfg.rope_scaling,
        "tie_word_embeddings": cfg.tied,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "float32",
        "bos_token_id": cfg.bos,
        "eos_token_id": one_or_list(cfg.eos),
    }


def one_or_list(ids):
    """A tuple of ids as Hugging Face writes it: a single id stands alone."""
    return list(ids) if len(ids) > 1 else ids[0]


# ---- tensors -------------------------------------------------------------------------------------


def read_tensors(directory, name="model"):
    """Read `name`.safetensors, or its shards -> ({tensor name: tensor}, path of the first file).

    Raises UserError if a file is missing, damaged or quantised, or a weight is not finite.
    """
    files = tensor_files(Path(directory), name)
    tensors, file_of = {}, {}
    for file in files:
        for key, value in read_tensor_file(file).items():
            tensors[key] = value
            file_of[key] = file

    # Broken weights would show only later, as a loss that is NaN
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise UserError(
                f"{file_of[key]}:0: tensor {key} holds NaN or infinity; the weights are broken"
            )
    return tensors, files[0]


def tensor_files(directory, name):
    """Return the paths of `name`.safetensors, or of its shards if there is no such file."""
    single_file = directory / f"{name}.safetensors"
    index = directory / f"{name}.safetensors.index.json"
    if single_file.exists() or not index.exists():
        return [single_file]

    # The index of a sharded model says which tensor is in which file
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and len(weight_map) > 0
    if not is_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f'{index}:1: "weight_map" must map tensor names to files')
    shards = sorted(set(weight_map.values()))
    return [directory / Path(shard).name for shard in shards]  # never outside the directory


def read_tensor_file(file):
    """Read one safetensors file -> {tensor name: tensor}."""
    tensors = {}
    try:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():
                dtype = opened.get_slice(key).get_dtype()
                if dtype not in DTYPES:
                    raise UserError(
                        f"{file}:0: tensor {key} is of type {dtype}, not of 16, 32 or 64 bits in "
                        f"floating point; {DEQUANTISE}"
                    )
                tensors[key] = opened.get_tensor(key)
    except OSError as e:
        raise UserError(
            f"{file}:0: cannot be read ({e.strerror or e}); is the download complete?"
        ) from None
    except SafetensorError as e:
        raise UserError(
            f"{file}:0: is not a complete safetensors file ({e}); is the download complete?"
        ) from None
    return tensors


def fill(parameters, tensors, file):
    """Copy tensors into parameters, both {name: tensor}. Names and shapes must be the same.

    file: where the tensors are from, for messages. Raises UserError.
    """
    # Compare everything before the first copy, so that a model is never half filled
    for name, p in parameters.items():
        if name not in tensors:
            raise UserError(f"{file}:0: tensor {name} {tuple(p.shape)} is missing")
        if tensors[name].shape != p.shape:
            raise UserError(
                f"{file}:0: tensor {name} has shape {tuple(tensors[name].shape)}, but the config "
                f"asks for {tuple(p.shape)}"
            )

    # A tensor that is left over belongs to another model than config.json describes
    extra = sorted(set(tensors) - set(parameters))
    if extra:
        shape = tuple(tensors[extra[0]].shape)
        raise UserError(
            f"{file}:0: tensor {extra[0]} {shape} is not part of this model "
            f"(such tensors: {len(extra)})"
        )

    # copy_ also converts: published weights are bfloat16, the parameters float32
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[name])


def fill_llama(llama, directory, name="model"):
    """Copy the weights of `name`.safetensors, or of its shards, into a Llama. Raises UserError."""
    tensors, file = read_tensors(directory, name)
    tensors = without_wrappers(tensors, file)

    # Old files store RoPE's frequencies, which llama.py computes
    for key in list(tensors):
        if key.endswith("rotary_emb.inv_freq"):
            del tensors[key]
    if llama.cfg.tied:
        tie(tensors, file)
    fill(dict(llama.named_parameters()), tensors, file)


def without_wrappers(tensors, file):
    """Remove what torch.compile and DataParallel have put into the names of tensors."""
    renamed = {}
    for key, value in tensors.items():
        # torch.compile names a module wherever it is, DataParallel the whole model
        name = key.replace("_orig_mod.", "")
        name = name.removeprefix("module.")
        if name in renamed:
            raise UserError(
                f"{file}:0: holds tensor {name} twice, once as {key}; remove one of them"
            )
        renamed[name] = value
    return renamed


def tie(tensors, file):
    """Leave one table of a tied model's two in `tensors`: the embedding, which is the head as well.

    A file may hold either, or both if they are equal. Raises UserError if they differ.
    """
    head = tensors.pop("lm_head.weight", None)
    if head is None:
        return
    embedding = tensors.setdefault("model.embed_tokens.weight", head)

    # transformers 4 drops the head here, transformers 5 drops the tie: the user has to decide
    if not torch.equal(embedding, head.to(embedding.dtype)):
        raise UserError(
            f"{file}:0: lm_head.weight differs from model.embed_tokens.weight, but config.json has "
            '"tie_word_embeddings": true; set it to false to use both, or remove lm_head.weight'
        )


# ---- tokenizer -----------------------------------------------------------------------------------


def read_tokenizer(directory, cfg):
    """Read the tokenizer of a directory -> Tokenizer, which adds the control tokens.

    cfg: the model's LlamaConfig. Raises UserError if the two do not fit together.
    """
    path = Path(directory) / "tokenizer.json"
    backend = read_backend(path)

    # Every id needs a row of the embedding, and bos and eos must be tokens
    last = max(backend.get_vocab().values(), default=-1)
    if last >= cfg.vocab_size:
        raise UserError(
            f"{path}:1: has a token {last}, but the embedding has only {cfg.vocab_size} rows"
        )
    for token in (cfg.bos, *cfg.eos):
        if backend.id_to_token(token) is None:
            raise UserError(f"{path}:1: has no token {token}, which config.json calls bos or eos")

    return Tokenizer(backend, cfg.bos, cfg.eos, files_of_tokenizer(path.parent))


def files_of_tokenizer(directory):
    """The files beside tokenizer.json that are saved with the model: {name: bytes}.

    Raises UserError if tokenizer_config.json cannot be read.
    """
    templates = sorted((directory / CHAT_TEMPLATES).glob("*.jinja"))
    names = [*TOKENIZER_FILES, *(f"{CHAT_TEMPLATES}/{file.name}" for file in templates)]
    files = {name: directory / name for name in names if (directory / name).is_file()}
    contents = {name: file.read_bytes() for name, file in files.items()}

    # With either of these fields transformers follows them instead of tokenizer.json, which has bos
    # put before a text and nothing else (tokenizer.py)
    if TOKENIZER_CONFIG in files:
        fields = read_json(files[TOKENIZER_CONFIG])
        bos_alone = {"add_bos_token": True, "add_eos_token": False}
        if bos_alone.keys() & fields.keys() and fields != fields | bos_alone:
            contents[TOKENIZER_CONFIG] = json.dumps(fields | bos_alone, indent=2).encode()
    return contents


def read_backend(path):
    """Read a tokenizer.json -> tokenizers.Tokenizer. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}:0: is missing; a model needs its tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises no narrower type
        raise UserError(f"{path}:1: is not a tokenizer ({e})") from None

    # A fine-tuned model's file may ask for these
    backend.no_padding()
    backend.no_truncation()
    return backend


def has_control_tokens(directory):
    """Whether the tokenizer of a directory had the control tokens when it was saved."""
    # Look into the file: a Tokenizer adds them to every vocabulary that it wraps
    return START in (directory / "tokenizer.json").read_text(encoding="utf-8")


def require_heads(directory):
    """Raise UserError if minatp/ is missing, but manifest.json says that it was saved.

    Its heads and φ would be untrained.
    """
    manifest = directory / "manifest.json"
    if manifest.exists() and not (directory / "minatp").exists():
        if '"minatp' in manifest.read_text(encoding="utf-8", errors="replace"):
            raise UserError(
                f"{directory}/minatp:0: is missing, although {manifest.name} lists it; copy it "
                f"again, or remove {manifest.name} to have the LLaMA alone"
            )


def add_control_tokens(model, tokenizer):
    """Add the rows of the three control tokens to the embeddings of a model (ATP).

    A new row starts as a copy of the row of `<<`, which begins a written step, or as the mean row
    if that is not one token.
    """
    ids = tokenizer.encode("<<")
    source = ids if len(ids) == 1 else slice(None)

    # π and φ share the tokenizer, so both get the rows
    control_tokens = [tokenizer.start, tokenizer.latent, tokenizer.end]
    model.policy.add_rows(control_tokens, source)
    if model.decode:
        model.decoder.add_rows(control_tokens, source)
    model.filler, model.end = tokenizer.latent, tokenizer.end


# ---- models --------------------------------------------------------------------------------------


def load_model(directory, **switches):
    """Load a model -> (ATP, Tokenizer).

    directory: a Hugging Face directory, one that `save_model` wrote, or a run's folder, which
    stands for its final/, or for its newest checkpoint if the run has not ended.
    switches: keyword arguments of ATP; they override the saved ones. A part that they ask for and
    the directory lacks starts untrained: heads at their initial values, φ from the weights of π.
    Raises UserError naming the file that is wrong.
    """
    # What describes the model comes first: it is quick to read, and to refuse
    directory = locate(directory)
    require_heads(directory)
    saved = read_switches(directory)
    cfg = read_config(directory / "config.json")
    tokenizer = read_tokenizer(directory, cfg)

    # Build the model. What training has reached are attributes, not arguments
    attributes = ("stage", "longest", "decoder_started")
    reached = {name: saved.pop(name) for name in attributes if name in saved}
    # A version that did not say so started φ at the end of stage 0, or with previews before it
    if saved.get("decode"):
        has_started = reached["stage"] > 0 or saved.get("previews", False)
        reached.setdefault("decoder_started", has_started)
    model = ATP(cfg, **saved | switches)
    for name, value in reached.items():
        setattr(model, name, value)
    model.filler, model.end = tokenizer.latent, tokenizer.end

    # Load the weights of π, of φ and of the heads
    fill_llama(model.policy, directory)
    if model.decode:
        if model.decoder_started:
            fill_llama(model.decoder, directory / "minatp", "decoder")
        else:
            model.decoder.start_from(model.policy)
    if saved:
        fill_heads(model, directory / "minatp", saved)

    # A model that is new to this project lacks the rows of the control tokens
    if not has_control_tokens(directory):
        add_control_tokens(model, tokenizer)
    return model, tokenizer


def read_switches(directory):
    """Read minatp/config.json -> dict; {} if the model is a plain LLaMA. Raises UserError.

    It holds keyword arguments of ATP, the stage that training has reached, `longest`, the most
    tokens that φ writes for a step, and whether φ has started.
    """
    path = locate(directory) / "minatp" / "config.json"
    if not path.parent.is_dir():
        return {}
    saved = read_json(path)

    # A missing, misspelt or mistyped switch would build another model than was saved
    required = {"c": int, "K": int, "vae": bool, "stop": bool, "decode": bool, "stage": int}
    optional = {"longest": int, "decoder_layers": int, "fillers": int}
    optional |= {"project": bool, "previews": bool, "decoder_started": bool}
    types = required | optional
    at_least_1 = {"c", "K", "longest", "decoder_layers"}
    for name in required.keys() | saved.keys():
        value = saved.get(name)
        minimum = 1 if name in at_least_1 else 0
        if type(value) is not types.get(name) or value < minimum:
            raise UserError(
                f'{path}:1: "{name}" is {value!r}; this file is written with the model, '
                "do not edit it by hand"
            )
    return saved


def heads_of(model):
    """Return {name: parameter} of the parts of an ATP besides the two language models."""
    parameters = model.named_parameters()
    return {name: p for name, p in parameters if not name.startswith(("policy.", "decoder."))}


def fill_heads(model, directory, saved):
    """Copy the saved weights into the heads. saved: what `read_switches` returned."""
    tensors, file = read_tensors(directory, "heads")
    heads = heads_of(model)

    # The parts that were saved: of the heads by their switches, of what someone has added to ATP
    # by the tensors that are there
    switch_of = {"latent_head": "vae", "stop_head": "stop", "projection": "project"}
    saved_parts = {part_of(name) for name in tensors} - switch_of.keys()
    saved_parts |= {part for part, switch in switch_of.items() if saved.get(switch)}

    # A part that the model lacks has been dropped on purpose, if it is one of those with a switch
    parts = {part_of(name) for name in heads}
    unknown = sorted(saved_parts - parts - switch_of.keys())
    if unknown:
        raise UserError(
            f"{file}:0: {unknown[0]} is no part of this model; if ATP has a switch for it, "
            "save_model, read_switches and fill_heads must know it as well"
        )

    # One that was not saved keeps its initial values
    loaded = parts & saved_parts
    heads = {name: p for name, p in heads.items() if part_of(name) in loaded}
    fill(heads, {name: t for name, t in tensors.items() if part_of(name) in loaded}, file)


def part_of(name):
    """The attribute of ATP that a parameter belongs to."""
    return name.split(".")[0]


def save_model(directory, model, tokenizer):
    """Write a model (ATP) and its tokenizer as the directory described at the head of this file."""
    directory = Path(directory)
    ours = directory / "minatp"
    ours.mkdir(parents=True, exist_ok=True)

    # What other programs load: π and the tokenizer
    write_json(directory / "config.json", hf_config(model.policy.cfg))
    policy = on_cpu(dict(model.policy.named_parameters()))
    save_file(policy, directory / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(directory, tokenizer)

    # What only this project loads: φ, the heads and the switches
    switches = {
        "c": model.c,
        "K": model.K,
        "vae": model.vae,
        "stop": model.stop,
        "decode": model.decode,
        "stage": model.stage,
        "longest": model.longest,
    }
    if model.decode:
        switches["decoder_layers"] = model.decoder.cfg.n_layer
        switches["previews"] = model.previews
        switches["decoder_started"] = model.decoder_started or model.stage > 0
        decoder = on_cpu(dict(model.decoder.named_parameters()))
        save_file(decoder, ours / "decoder.safetensors")
    if model.project:
        switches["project"] = True
    if model.fillers is not None:
        switches["fillers"] = model.fillers
    write_json(ours / "config.json", switches)
    save_file(on_cpu(heads_of(model)), ours / "heads.safetensors")


def save_tokenizer(directory, tokenizer):
    """Write tokenizer.json and the files that belong to it."""
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    for name, content in tokenizer.files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)

    # transformers needs these two, and a tokenizer trained here comes without them
    if TOKENIZER_CONFIG not in tokenizer.files:
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": tokenizer.backend.id_to_token(tokenizer.bos),
            "eos_token": tokenizer.backend.id_to_token(tokenizer.eos[0]),
        }
        write_json(directory / TOKENIZER_CONFIG, tokenizer_config)
    if "generation_config.json" not in tokenizer.files:
        generation = {"bos_token_id": tokenizer.bos, "eos_token_id": one_or_list(tokenizer.eos)}
        write_json(directory / "generation_config.json", generation)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def on_cpu(parameters):
    """{name: parameter} -> {name: tensor on the CPU}, contiguous, as safetensors wants them."""
    return {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
