"""Models in Hugging Face directories: what is loaded, what is saved, and what starts fresh."""

import json
import shutil

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import processors

from minatp.latent import ATP
from minatp.optim import build_optimizer
from minatp.problems import generate
from minatp.run import huggingface, options
from minatp.run.checkpoint import save_checkpoint
from minatp.run.huggingface import (
    TOKENIZER_FILES,
    load_model,
    read_config,
    save_model,
    save_tokenizer,
)
from minatp.tokenizer import Tokenizer, train_tokenizer

from runs import MODEL
from small import small_model


@pytest.fixture
def copy(tmp_path):
    """A directory with a copy of the tied model, to be changed."""
    shutil.copytree(MODEL, tmp_path / "copy")
    return tmp_path / "copy"


def assert_same_parameters(a, b):
    names = [name for name, _ in a.named_parameters()]
    assert names == [name for name, _ in b.named_parameters()]
    for name, p, q in zip(names, a.parameters(), b.parameters()):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("spare", [0, 2, 64])
def test_the_control_tokens_start_as_the_row_of_the_operator(spare, tmp_path):
    """Also if the embedding has rows to spare, as published ones are padded."""
    shutil.copytree(MODEL, tmp_path / "hf")
    config, weights = tmp_path / "hf" / "config.json", tmp_path / "hf" / "model.safetensors"
    saved, tensors = json.loads(config.read_text()), load_file(weights)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        W = tensors[name]
        tensors[name] = torch.cat((W, torch.full((spare, W.shape[1]), 7.0)))
    save_file(tensors, weights)
    config.write_text(json.dumps({**saved, "vocab_size": saved["vocab_size"] + spare}))

    model, tokenizer = load_model(tmp_path / "hf")
    [operator] = tokenizer.encode("<<")
    for llama in (model.policy, model.decoder):
        W = llama.model.embed_tokens.weight
        assert len(W) == llama.cfg.vocab_size == saved["vocab_size"] + max(3, spare)
        for i in (tokenizer.start, tokenizer.latent, tokenizer.end):
            assert torch.equal(W[i], W[operator])


@pytest.fixture
def saved(tmp_path):
    """(folder, model, tokenizer): a model saved after its second curriculum stage."""
    torch.manual_seed(1)
    model, tokenizer = load_model(MODEL, c=2, K=3, decoder_layers=1)
    model.stage, model.longest = 2, 31
    save_model(tmp_path / "saved", model, tokenizer)
    return tmp_path / "saved", model, tokenizer


def test_a_saved_model_loads_as_it_was(saved):
    folder, model, tokenizer = saved
    loaded, loaded_tokenizer = load_model(folder)
    assert (loaded.c, loaded.K) == (2, 3)
    assert (loaded.vae, loaded.stop, loaded.decode) == (True, True, True)
    assert (loaded.stage, loaded.longest) == (2, 31)
    assert_same_parameters(loaded, model)
    assert loaded_tokenizer.start == tokenizer.start
    assert loaded_tokenizer.end == tokenizer.end
    assert loaded_tokenizer.encode("a 12") == tokenizer.encode("a 12")


@pytest.mark.parametrize("method", options.METHODS)
def test_a_model_of_each_method_loads_as_it_was(method, tmp_path):
    model, tokenizer = small_model(method=method)
    model.stage = 2
    save_model(tmp_path / "saved", model, tokenizer)
    loaded, _ = load_model(tmp_path / "saved")
    for switch in ("c", "K", "vae", "stop", "decode", "project", "fillers", "stage"):
        assert getattr(loaded, switch) == getattr(model, switch), switch
    assert_same_parameters(loaded, model)
    assert (loaded.filler, loaded.end) == (tokenizer.latent, tokenizer.end)
    assert loaded.fillers_at(3) == model.fillers_at(3)


def test_a_saved_model_loads_as_another_method(saved, tmp_path):
    """Parts that the other method lacks are dropped, parts that it adds start fresh."""
    folder, _, tokenizer = saved
    coconut, _ = load_model(folder, vae=False, stop=False, decode=False)
    for part in ("latent_head", "stop_head", "decoder"):
        assert not hasattr(coconut, part)

    save_model(tmp_path / "coconut", coconut, tokenizer)
    atp, _ = load_model(tmp_path / "coconut", vae=True, stop=True, decode=True)
    assert torch.equal(atp.decoder.model.norm.weight, atp.policy.model.norm.weight)


def test_a_head_of_a_readers_own_is_saved_and_loaded(tmp_path, monkeypatch):
    class Mixed(ATP):
        def __init__(self, cfg, **switches):
            super().__init__(cfg, **switches)
            self.mix = torch.nn.Linear(cfg.n_embd, cfg.n_embd)
            self.scale = torch.nn.Parameter(torch.randn(3))

    save_model(tmp_path / "without", *load_model(MODEL))
    monkeypatch.setattr(huggingface, "ATP", Mixed)
    model, tokenizer = load_model(tmp_path / "without")  # the new head starts untrained
    save_model(tmp_path / "with", model, tokenizer)
    loaded, _ = load_model(tmp_path / "with")
    assert torch.equal(loaded.mix.weight, model.mix.weight)
    assert torch.equal(loaded.scale, model.scale)


def test_files_of_others_are_kept(tmp_path):
    """A tokenizer's further files go where it goes: into checkpoints, and on from there."""
    shutil.copytree(MODEL, tmp_path / "hf")
    further = "additional_chat_templates/tools.jinja"
    (tmp_path / "hf" / further).parent.mkdir()
    for name in (*TOKENIZER_FILES, further):
        (tmp_path / "hf" / name).write_text('{"kept": 1}')
    model, tokenizer = load_model(tmp_path / "hf", c=2, K=3)
    optimizer = build_optimizer(options.parse([], ""), model)
    save_checkpoint(tmp_path / "run", {"step": 1}, model, tokenizer, optimizer)
    shutil.rmtree(tmp_path / "hf")
    save_model(tmp_path / "out", *load_model(tmp_path / "run"))

    for name in (*TOKENIZER_FILES, further):
        assert (tmp_path / "out" / name).read_text() == '{"kept": 1}'
    assert model.policy.cfg.tied
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert set(f.keys()) == {name for name, _ in model.policy.named_parameters()}
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_parameters" not in saved


def test_shards_are_joined(tmp_path):
    # split the one file of the fixture into two, with the index that lists them
    shutil.copytree(MODEL, tmp_path, dirs_exist_ok=True)
    tensors = {}
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    for file in MODEL.glob("*.safetensors"):
        tensors |= load_file(file)
    names, weight_map = sorted(tensors), {}
    for i in (0, 1):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[i::2]}, tmp_path / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))

    of_one_file, _ = load_model(MODEL, K=3)
    of_shards, _ = load_model(tmp_path, K=3)
    assert_same_parameters(of_one_file.policy, of_shards.policy)


# ---- bos, for other programs ---------------------------------------------------------------------

BOS = "<|begin_of_text|>"
POST_PROCESSORS = {
    "none": None,
    "offsets alone": processors.ByteLevel(trim_offsets=True),
    "nothing": processors.TemplateProcessing("$A", "$A $B", []),
    "bos": processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A $B", [(BOS, 384)]),
    "bos and another": processors.TemplateProcessing(
        f"{BOS} $A {BOS}", f"{BOS} $A $B {BOS}", [(BOS, 384)]
    ),
}


def check_bos_of_a_saved_tokenizer(tokenizer, folder):
    """Other programs read bos before a text, and we read it once, also from what was saved."""
    folder.mkdir()
    save_tokenizer(folder, tokenizer)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, text = tokenizer.bos, tokenizer.encode("Ann has 5")
    assert backend.encode("Ann has 5").ids == [bos, *text]
    assert backend.encode("Ann has 5", "Ann has 5").ids[: len(text) + 1] == [bos, *text]

    again = Tokenizer(backend, bos, tokenizer.eos)
    assert again.encode("Ann has 5") == text
    assert again.prompt("Ann has 5") == tokenizer.prompt("Ann has 5")
    assert again.prompt("Ann has 5").count(bos) == 1


@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_a_published_tokenizer_is_saved_with_bos_before_a_text(name, tmp_path, copy):
    _, original = load_model(copy)
    backend = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    if POST_PROCESSORS[name] is None:
        fields = json.loads(backend.to_str())
        backend = tokenizers.Tokenizer.from_str(json.dumps({**fields, "post_processor": None}))
    else:
        backend.post_processor = POST_PROCESSORS[name]
    backend.save(str(copy / "tokenizer.json"))

    _, tokenizer = load_model(copy)
    assert tokenizer.prompt("Ann has 5") == original.prompt("Ann has 5")
    check_bos_of_a_saved_tokenizer(tokenizer, tmp_path / "saved")


def test_a_tokenizer_trained_here_is_saved_with_bos_before_a_text(tmp_path):
    tokenizer = train_tokenizer(generate("labelled", 50, seed=0), 400)
    check_bos_of_a_saved_tokenizer(tokenizer, tmp_path / "saved")


@pytest.mark.parametrize(
    "before, after",
    [
        ({"kept": 1}, {"kept": 1}),
        ({"add_bos_token": True, "add_eos_token": False}, None),
        ({"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": False}),
        ({"add_eos_token": False}, {"add_bos_token": True, "add_eos_token": False}),
    ],
)
def test_a_tokenizer_config_may_not_take_bos_away(before, after, copy, tmp_path):
    (copy / "tokenizer_config.json").write_text(json.dumps(before))
    save_model(tmp_path / "saved", *load_model(copy))
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved == (after or before)


# ---- how others write the same model -------------------------------------------------------------

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def change_tensors(directory, change):
    """Replace the tensors of a directory by change({name: tensor})."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file)


def change_config(directory, **fields):
    """Set fields of config.json."""
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


def assert_loads_as_the_original(directory):
    original, _ = load_model(MODEL)
    loaded, _ = load_model(directory)
    assert_same_parameters(loaded.policy, original.policy)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_that_a_wrapper_has_changed(prefix, copy):
    change_tensors(copy, lambda tensors: {prefix + name: t for name, t in tensors.items()})
    assert_loads_as_the_original(copy)


def test_names_of_layers_compiled_one_by_one(copy):
    change_tensors(
        copy,
        lambda tensors: {
            name.replace("layers.0.", "layers.0._orig_mod."): t for name, t in tensors.items()
        },
    )
    assert_loads_as_the_original(copy)


@pytest.mark.parametrize("names", [[HEAD], [EMBEDDING, HEAD]])
def test_the_one_table_of_a_tied_model_under_any_name(names, copy):
    def rename(tensors):
        table = tensors.pop(EMBEDDING)
        return tensors | {name: table.clone() for name in names}

    change_tensors(copy, rename)
    assert_loads_as_the_original(copy)


OPTIONAL = (
    "head_dim num_key_value_heads tie_word_embeddings attention_bias mlp_bias rope_scaling "
    "rope_parameters rope_theta max_position_embeddings rms_norm_eps hidden_act"
).split()


def test_null_in_config_json_is_as_absent(copy):
    without = json.loads((copy / "config.json").read_text())
    for name in OPTIONAL:
        without.pop(name, None)
    (copy / "config.json").write_text(json.dumps(without))
    absent = read_config(copy / "config.json")

    change_config(copy, **dict.fromkeys(OPTIONAL))
    assert read_config(copy / "config.json") == absent

    # the defaults of transformers
    assert absent.n_kv_head == absent.n_head
    assert absent.head_dim == absent.n_embd // absent.n_head
    assert (absent.tied, absent.rope_theta, absent.rope_scaling) == (False, 10000.0, None)
    assert (absent.block_size, absent.norm_eps) == (2048, 1e-6)


def test_rope_is_read_in_either_spelling(copy):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }

    def read(**fields):
        spelled = {"rope_theta": None, "rope_scaling": None, "rope_parameters": None, **fields}
        change_config(copy, **spelled)
        cfg = read_config(copy / "config.json")
        return cfg.rope_theta, cfg.rope_scaling

    older = {**scaling, "type": "llama3"}
    del older["rope_type"]
    both_types = {**scaling, "type": "llama3"}
    for fields in (
        {"rope_theta": 5e5, "rope_scaling": scaling},
        {"rope_theta": 5e5, "rope_scaling": older},
        {"rope_theta": 5e5, "rope_scaling": both_types},
        {"rope_parameters": {**scaling, "rope_theta": 5e5, "partial_rotary_factor": 1.0}},
        {"rope_parameters": scaling, "rope_theta": 5e5},
    ):
        assert read(**fields) == (5e5, scaling), fields

    plain = {"rope_theta": 1e5, "rope_type": "default"}
    assert read(rope_parameters=plain) == (1e5, None)
    assert read(rope_theta=1e5, rope_parameters={"rope_theta": None}) == (1e5, None)
