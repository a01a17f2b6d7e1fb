"""Models in Hugging Face directories: what is loaded, what is saved, and what starts fresh."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minatp.latent import ATP
from minatp.optim import build_optimizer
from minatp.run import huggingface, options
from minatp.run.checkpoint import save_checkpoint
from minatp.run.huggingface import TOKENIZER_FILES, load_model, save_model

from runs import MODEL


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

    save_model(tmp_path / "without", *load_model(MODEL))
    monkeypatch.setattr(huggingface, "ATP", Mixed)
    model, tokenizer = load_model(tmp_path / "without")  # the new head starts untrained
    save_model(tmp_path / "with", model, tokenizer)
    loaded, _ = load_model(tmp_path / "with")
    assert torch.equal(loaded.mix.weight, model.mix.weight)


def test_files_of_others_are_kept(tmp_path):
    """A tokenizer's further files go where it goes: into checkpoints, and on from there."""
    shutil.copytree(MODEL, tmp_path / "hf")
    for name in TOKENIZER_FILES:
        (tmp_path / "hf" / name).write_text('{"kept": 1}')
    model, tokenizer = load_model(tmp_path / "hf", c=2, K=3)
    optimizer = build_optimizer(options.parse([], ""), model)
    save_checkpoint(tmp_path / "run", {"step": 1}, model, tokenizer, optimizer)
    shutil.rmtree(tmp_path / "hf")
    save_model(tmp_path / "out", *load_model(tmp_path / "run"))

    for name in TOKENIZER_FILES:
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
