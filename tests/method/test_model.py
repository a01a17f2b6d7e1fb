"""The LLaMA and its files: shapes of the published model, Hugging Face directories in and out."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minatp import checkpoint, config, muon
from minatp.latent import ATP
from minatp.llama import Llama, LlamaConfig, rope_frequencies

FIXTURE = Path(__file__).parent / "fixtures" / "conformance"


def read(llama, ids):
    valid = torch.ones(ids.shape, dtype=torch.bool)
    return llama.logits(llama(llama.embed(ids), valid, llama.cache(*ids.shape)))


def test_llama_1b_has_the_published_size():
    with torch.device("meta"):
        llama = Llama(LlamaConfig())
    assert sum(p.numel() for p in llama.parameters()) == 1_235_814_400
    names = {n: tuple(p.shape) for n, p in llama.named_parameters()}
    assert names["model.layers.15.self_attn.k_proj.weight"] == (512, 2048) and "lm_head.weight" not in names
    layers = llama.model["layers"]
    llama.model["layers"] = torch.nn.ModuleList([layers[0]] * len(layers))  # a forward pass of all 16, in the memory of one
    llama = llama.bfloat16().to_empty(device="cpu")
    for p in llama.parameters():
        torch.nn.init.constant_(p, 0.01)
    llama.freq = rope_frequencies(llama.cfg)
    with torch.no_grad():
        logits = read(llama, torch.tensor([[5, 6, 7]]))
    assert logits.shape == (1, 3, 128256) and logits.isfinite().all()


@pytest.mark.parametrize("name", ["policy", "decoder"])
def test_transformers_agrees_before_and_after_a_round_trip(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ids = torch.randint(10, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FIXTURE / name, dtype=torch.float32)
    llama = Llama(read_config(FIXTURE / name / "config.json"))
    checkpoint.fill_llama(llama, FIXTURE / name)
    torch.testing.assert_close(read(llama, ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)

    model, tokenizer = load_model(FIXTURE / name, c=2, K=3)
    save_model(tmp_path, model, tokenizer)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(again(ids).logits, read(model.policy, ids), rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("<<5+3=8>>", add_special_tokens=False).input_ids == tokenizer.encode("<<5+3=8>>")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" in saved and "rope_parameters" not in saved and saved["vocab_size"] == len(tokenizer)


@pytest.mark.parametrize("spare", [0, 2, 64])
def test_the_control_tokens_start_as_the_row_of_the_operator(spare, tmp_path):
    """Also where the embedding has rows to spare, as published ones are padded."""
    shutil.copytree(FIXTURE / "policy", tmp_path / "hf")
    config, weights = tmp_path / "hf" / "config.json", tmp_path / "hf" / "model.safetensors"
    told, tensors = json.loads(options.read_text()), load_file(weights)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        tensors[name] = torch.cat((tensors[name], torch.full((spare, tensors[name].shape[1]), 7.0)))
    save_file(tensors, weights)
    options.write_text(json.dumps({**told, "vocab_size": told["vocab_size"] + spare}))
    model, tokenizer = load_model(tmp_path / "hf")
    operator, = tokenizer.encode("<<")
    for llama in (model.policy, model.decoder):
        W = llama.model.embed_tokens.weight
        assert len(W) == llama.cfg.vocab_size == told["vocab_size"] + max(3, spare)
        for i in (tokenizer.start, tokenizer.latent, tokenizer.end):
            assert torch.equal(W[i], W[operator])


def test_a_saved_model_loads_as_it_was(tmp_path):
    torch.manual_seed(1)
    model, tokenizer = load_model(FIXTURE / "policy", c=2, K=3, decoder_layers=1)
    model.stage, model.longest = 2, 31
    save_model(tmp_path, model, tokenizer)
    again, tokens2 = load_model(tmp_path)
    assert (again.c, again.K, again.vae, again.stop, again.decode, again.stage, again.longest) == (2, 3, True, True, True, 2, 31)
    for (n, a), (m, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert n == m and torch.equal(a, b), n
    assert (tokens2.start, tokens2.end, tokens2.encode("a 12")) == (tokenizer.start, tokenizer.end, tokenizer.encode("a 12"))
    # as another method: parts that it has not are left, parts that it adds start fresh
    coconut, _ = load_model(tmp_path, vae=False, stop=False, decode=False)
    assert not any(hasattr(coconut, part) for part in ("latent_head", "stop_head", "decoder"))
    save_model(tmp_path / "coconut", coconut, tokenizer)
    full, _ = load_model(tmp_path / "coconut", vae=True, stop=True, decode=True)
    assert torch.equal(full.decoder.model.norm.weight, full.policy.model.norm.weight)


def test_a_head_of_a_readers_own_is_saved_and_loaded(tmp_path, monkeypatch):
    class Mixed(ATP):
        def __init__(self, cfg, **switches):
            super().__init__(cfg, **switches)
            self.mix = torch.nn.Linear(cfg.n_embd, cfg.n_embd)

    save_model(tmp_path / "without", *load_model(FIXTURE / "policy"))
    monkeypatch.setattr(checkpoint, "ATP", Mixed)
    model, tokenizer = load_model(tmp_path / "without")  # where it begins
    save_model(tmp_path / "with", model, tokenizer)
    assert torch.equal(load_model(tmp_path / "with")[0].mix.weight, model.mix.weight)


def test_files_of_others_are_kept(tmp_path):
    shutil.copytree(FIXTURE / "policy", tmp_path / "hf")
    for name in checkpoint.KEPT:
        (tmp_path / "hf" / name).write_text('{"kept": 1}')
    model, tokenizer = load_model(tmp_path / "hf", c=2, K=3)
    checkpoint.save_checkpoint(tmp_path / "run", {"step": 1}, model, tokenizer, build_optimizer(options.parse([], ""), model))
    shutil.rmtree(tmp_path / "hf")
    save_model(tmp_path / "out", *load_model(tmp_path / "run"))
    assert all((tmp_path / "out" / name).read_text() == '{"kept": 1}' for name in checkpoint.KEPT)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert model.policy.cfg.tied and set(f.keys()) == {n for n, _ in model.policy.named_parameters()}
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["rope_scaling"]["rope_type"] == "llama3" and "rope_parameters" not in saved


def test_shards_are_joined(tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(FIXTURE / "policy", tmp_path, dirs_exist_ok=True)
    for old in tmp_path.glob("*.safetensors*"):
        old.unlink()
    tensors = {}
    for file in (FIXTURE / "policy").glob("*.safetensors"):
        tensors |= load_file(file)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {k: f for f, keys in parts.items() for k in keys}}))
    a, b = (load_model(d, K=3)[0].policy for d in (FIXTURE / "policy", tmp_path))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_gradient_and_preallocated_caches_agree_with_gqa_and_padding():
    torch.manual_seed(0)
    cfg = LlamaConfig(vocab_size=50, n_layer=2, n_head=4, n_kv_head=1, n_embd=32, n_inner=40, head_dim=8, rope_theta=100.0,
                      rope_scaling=None, bos=0, eos=(1,))
    model = ATP(cfg, K=2)
    x, valid = torch.randn(3, 9, 32), torch.rand(3, 9) > 0.3
    valid[1] = False
    valid[:, -1] = True
    whole = model.policy(x, valid, model.policy.cache(3, 9))
    with torch.no_grad():
        cache = model.policy.cache(3, 9)
        pieces = torch.cat([model.policy(x[:, t:t + 1], valid[:, t:t + 1], cache) for t in range(9)], 1)
    torch.testing.assert_close(whole[valid], pieces[valid], rtol=1e-5, atol=1e-5)


def test_the_last_columns_alone_are_what_they_are_among_all():
    torch.manual_seed(0)
    cfg = LlamaConfig(vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=40, head_dim=8, rope_theta=100.0,
                      rope_scaling=None, bos=0, eos=(1,))
    llama = Llama(cfg).init_weights().double()
    x, more, valid = torch.randn(3, 9, 32).double(), torch.randn(3, 2, 32).double(), torch.arange(9) >= torch.tensor([[4], [0], [6]])

    def read(n):
        cache = llama.cache(3, 11)
        h, after = llama(x, valid, cache, n)[:, -2:], llama(more, valid[:, -2:], cache)
        return h, after, *torch.autograd.grad(h.sin().sum() + after.cos().sum(), list(llama.model.layers.parameters()))

    torch.testing.assert_close(read(2), read(None))
