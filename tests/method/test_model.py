"""The LLaMA: the published size, Hugging Face's logits, its caches; and the latent head."""

import json
import math
from dataclasses import replace

import pytest
import torch

from minatp.latent import LatentHead
from minatp.llama import Llama, LlamaConfig, rope_frequencies
from minatp.run.huggingface import fill_llama, load_model, read_config, save_model

from runs import MODEL
from small import small_model

SMALL_LLAMA = LlamaConfig(
    vocab_size=50,
    n_layer=2,
    n_head=4,
    n_kv_head=1,
    n_embd=32,
    n_inner=40,
    head_dim=8,
    rope_theta=100.0,
    rope_scaling=None,
    bos=0,
    eos=(1,),
)


def logits_of(llama, ids):
    """ids (B, T), nothing padded -> (B, T, vocab_size)."""
    mask = torch.ones(ids.shape, dtype=torch.bool)
    return llama.logits(llama(llama.embed(ids), mask, llama.cache(*ids.shape)))


def test_llama_1b_has_the_published_size():
    with torch.device("meta"):
        llama = Llama(LlamaConfig())
    assert sum(p.numel() for p in llama.parameters()) == 1_235_814_400
    shapes = {name: tuple(p.shape) for name, p in llama.named_parameters()}
    assert shapes["model.layers.15.self_attn.k_proj.weight"] == (512, 2048)
    assert "lm_head.weight" not in shapes

    # a forward pass of all 16 layers, in the memory of one
    layers = llama.model["layers"]
    llama.model["layers"] = torch.nn.ModuleList([layers[0]] * len(layers))
    llama = llama.bfloat16().to_empty(device="cpu")
    for p in llama.parameters():
        torch.nn.init.constant_(p, 0.01)
    llama.freq = rope_frequencies(llama.cfg)
    with torch.no_grad():
        logits = logits_of(llama, torch.tensor([[5, 6, 7]]))
    assert logits.shape == (1, 3, 128256)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["policy", "decoder"])
def test_transformers_agrees_before_and_after_a_round_trip(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = MODEL.parent / name
    ids = torch.randint(10, 300, (2, 11), generator=torch.Generator().manual_seed(0))

    # before: a Hugging Face directory, loaded by either
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = Llama(read_config(folder / "config.json"))
    fill_llama(ours, folder)
    torch.testing.assert_close(logits_of(ours, ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)

    # after: the directory that we save, with its control tokens
    model, tokenizer = load_model(folder, c=2, K=3)
    save_model(tmp_path, model, tokenizer)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = logits_of(model.policy, ids)
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=1e-5)

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    their_ids = their_tokenizer("<<5+3=8>>", add_special_tokens=False).input_ids
    assert their_ids == tokenizer.encode("<<5+3=8>>")

    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" in saved
    assert "rope_parameters" not in saved
    assert saved["vocab_size"] == len(tokenizer)


def test_gradient_and_preallocated_caches_agree_with_gqa_and_padding():
    torch.manual_seed(0)
    llama = Llama(SMALL_LLAMA)
    x = torch.randn(3, 9, 32)
    mask = torch.rand(3, 9) > 0.3
    mask[1] = False
    mask[:, -1] = True

    # under autograd, in one pass
    expected = llama(x, mask, llama.cache(3, 9))

    # without autograd, column by column
    columns = []
    with torch.no_grad():
        cache = llama.cache(3, 9)
        for t in range(9):
            columns.append(llama(x[:, t : t + 1], mask[:, t : t + 1], cache))
    h = torch.cat(columns, 1)
    torch.testing.assert_close(h[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_the_last_columns_alone_are_what_they_are_among_all():
    """Their hidden states, those of later columns, and the gradients."""
    torch.manual_seed(0)
    llama = Llama(replace(SMALL_LLAMA, n_kv_head=2)).init_weights().double()
    x = torch.randn(3, 9, 32).double()
    x_later = torch.randn(3, 2, 32).double()
    mask = torch.arange(9) >= torch.tensor([[4], [0], [6]])

    def read(n):
        """Read x, of which n columns are returned (None: all), then x_later."""
        cache = llama.cache(3, 11)
        h = llama(x, mask, cache, n)[:, -2:]
        h_later = llama(x_later, mask[:, -2:], cache)
        loss = h.sin().sum() + h_later.cos().sum()
        grads = torch.autograd.grad(loss, list(llama.model.layers.parameters()))
        return h, h_later, *grads

    torch.testing.assert_close(read(2), read(None))


def test_a_standardised_latent_head_tells_problems_apart():
    """However large a dimension is that is the same in every state."""
    torch.manual_seed(0)
    D = 64
    head = LatentHead(D)
    h = torch.randn(500, D) * torch.logspace(-1, 1, D)
    h[:, 3] = 1000.0
    same_for_all = head(h)[0].std(0).mean()
    W, b = head.fc[0].weight.clone(), head.fc[0].bias.clone()

    head.standardise(h)
    std = h.std(0, correction=0) + 0.02 * h.square().mean().sqrt()
    expected = (h - h.mean(0)) / std @ W.T + b
    assert (head.fc[0](h) - expected).abs().max() < 1e-3
    assert head(h)[0].std(0).mean() > 5 * same_for_all


@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_the_density_of_a_latent_is_that_of_what_is_drawn(spread):
    """By the change of variables: log p(z) = log N(ε; 0, I) − log |dz/dε|."""
    model, _ = small_model()
    model.double()
    h = torch.randn(5, 32, dtype=torch.float64)
    eps = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    latent = model.propose(h, eps, spread=spread)
    [slope] = torch.autograd.grad(latent.z.sum(), eps)
    expected = (-0.5 * (eps**2 + math.log(2 * math.pi)) - slope.abs().log()).sum(-1)
    torch.testing.assert_close(latent.logp, expected)
