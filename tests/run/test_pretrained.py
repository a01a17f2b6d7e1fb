"""A published LLaMA, beside transformers: the same numbers, the same ids, and back again.

Apart from the fast suite, because it needs the weights (SmolLM2-135M will do), transformers, and
some minutes:

    MINATP_PRETRAINED=SmolLM2-135M-Instruct python -m pytest -q tests/run/test_pretrained.py
"""

import json
import os
from pathlib import Path

import pytest
import torch

import train
from minatp.llama import Llama
from minatp.run.device import autocast, multiplies_bfloat16
from minatp.run.huggingface import (
    fill_llama,
    load_model,
    read_config,
    read_tokenizer,
    save_model,
)

from runs import go

DIRECTORY = os.environ.get("MINATP_PRETRAINED")
if not DIRECTORY:
    pytest.skip("MINATP_PRETRAINED names no Hugging Face directory", allow_module_level=True)
DIRECTORY = Path(DIRECTORY).resolve()
transformers = pytest.importorskip("transformers")

QUESTIONS = [
    "A baker sells 12 rolls in the morning and twice as many at noon. How many rolls is that?",
    "Mia has 3 jars with 8 marbles each. She gives 5 marbles away. How many are left?",
    "A train needs 45 minutes for 60 km. How far does it go in 3 hours?",
    "If 4 pens cost $6, what do 10 pens cost?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Tom is 7 years older than Eva. Together they are 31. How old is Eva?",
    "1 + 2 + 3 + 4 =",
    "Translate into French: good morning, my friends.",
    "def add(a, b):\n    return",
]
TEXTS = [
    *QUESTIONS,
    "",
    " two  spaces\tand a tab\n\nand lines \n",
    "<<12+7=19>>\n### 1,000.50 €",
    "naïve café, 東京, Ω ≈ 3½, 👩‍🚀",
    "text that names <|im_start|>, <|start-latent|> and <|end-latent|>",
]


@pytest.fixture(scope="module")
def theirs():
    """The model of transformers. It writes on after eos, and prefers no word but the likeliest."""
    model = load_theirs(DIRECTORY)
    model.generation_config = transformers.GenerationConfig()
    return model


@pytest.fixture(scope="module")
def ours():
    """Our Llama with the same weights."""
    llama = Llama(read_config(DIRECTORY / "config.json"))
    fill_llama(llama, DIRECTORY)
    return llama.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(DIRECTORY, read_config(DIRECTORY / "config.json"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, model, tokenizer): what a run saves as final/, with its control tokens."""
    folder = tmp_path_factory.mktemp("saved") / "final"
    model, tokenizer = load_model(DIRECTORY, c=1, K=2, decoder_layers=1)
    save_model(folder, model, tokenizer)
    return folder, model.eval(), tokenizer


def load_theirs(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def read(llama, ids):
    """(logits (T, V), the cache with room for 64 more) of our Llama after reading a list of ids."""
    ids = torch.tensor([ids])
    cache = llama.cache(1, ids.shape[1] + 64)
    h = llama(llama.embed(ids), torch.ones_like(ids, dtype=torch.bool), cache)
    return llama.logits(h)[0].float(), cache


@torch.no_grad()
def write(llama, ids, n):
    """The n likeliest ids after `ids`, one by one, and by how much each led the second."""
    logits, cache = read(llama, ids)
    written, margins = [], []
    for _ in range(n):
        first, second = logits[-1].topk(2).values
        margins.append(float(first - second))
        written.append(int(logits[-1].argmax()))
        x = llama.embed(torch.tensor(written[-1:]))
        h = llama.step(x, torch.tensor([True]), cache)
        logits = llama.logits(h)
    return written, margins


@torch.no_grad()
def logits_of_theirs(theirs, ids):
    return theirs(torch.tensor([ids])).logits[0].float()


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
def test_logits_are_those_of_transformers(question, ours, theirs, tokenizer):
    ids = [tokenizer.bos, *tokenizer.encode(question)]
    logits, _ = read(ours, ids)
    expected = logits_of_theirs(theirs, ids)
    assert torch.allclose(logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_bfloat16_loses_no_more_than_it_does_in_transformers(ours, theirs, tokenizer):
    lost, lost_by_theirs = 0.0, 0.0
    for question in QUESTIONS[:3]:
        ids = [tokenizer.bos, *tokenizer.encode(question)]
        exact = logits_of_theirs(theirs, ids)
        with autocast(torch.device("cpu"), "bfloat16"):
            lost += float((read(ours, ids)[0] - exact).pow(2).mean())
            lost_by_theirs += float((logits_of_theirs(theirs, ids) - exact).pow(2).mean())
    assert 0 < lost < 1.5 * lost_by_theirs


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_words_are_those_of_transformers(question, ours, theirs, tokenizer):
    ids = [tokenizer.bos, *tokenizer.encode(question)]
    written, margins = write(ours, ids, 32)
    all_ids = theirs.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)
    expected = all_ids[0, len(ids) :].tolist()
    assert len(expected) == 32

    # After a tie the two may write different texts
    is_tie = [margin < 1e-4 for margin in margins]
    n = is_tie.index(True) if True in is_tie else 32
    assert n > 8
    assert written[:n] == expected[:n]


# ---- text ----------------------------------------------------------------------------------------


def test_text_survives_the_tokenizer(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_survive_and_are_never_made_of_text(tokenizer):
    names = ["<|start-latent|>", "<|latent|>", "<|end-latent|>"]
    special = {tokenizer.bos, *tokenizer.eos, tokenizer.start, tokenizer.latent, tokenizer.end}
    for name, token in zip(names, (tokenizer.start, tokenizer.latent, tokenizer.end)):
        assert tokenizer.decode([token]) == name
    for text in TEXTS:
        assert not special & set(tokenizer.encode(text))


def test_ids_are_those_of_transformers(saved):
    folder, _, tokenizer = saved
    published = transformers.AutoTokenizer.from_pretrained(DIRECTORY)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[:-1]:  # the last names special tokens, which only we read as text
        ids = tokenizer.encode(text)
        assert published(text, add_special_tokens=False).input_ids == ids
        assert again(text, add_special_tokens=False).input_ids == ids

        # the model was taught with bos, whether or not the published tokenizer puts it there
        assert again(text).input_ids == [tokenizer.bos, *ids]

    assert again.bos_token_id == tokenizer.bos
    assert again.eos_token_id in tokenizer.eos
    for name, token in (("<|start-latent|>", tokenizer.start), ("<|end-latent|>", tokenizer.end)):
        assert again(name, add_special_tokens=False).input_ids == [token]
        assert again.decode([token]) == name


def test_the_chat_template_goes_with_the_model(saved):
    folder, _, _ = saved
    published = transformers.AutoTokenizer.from_pretrained(DIRECTORY)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == published.chat_template
    if again.chat_template:
        chat = [{"role": "user", "content": "Hello"}]
        assert again.apply_chat_template(chat, tokenize=False) == published.apply_chat_template(
            chat, tokenize=False
        )


# ---- back to transformers, and training ----------------------------------------------------------


def test_a_saved_model_has_the_same_logits_in_transformers(saved):
    folder, model, tokenizer = saved
    theirs = load_theirs(folder)
    for question in QUESTIONS[:3]:
        ids = tokenizer.prompt(question)
        logits, _ = read(model.policy, ids)
        expected = logits_of_theirs(theirs, ids)
        assert logits.shape[1] == expected.shape[1] == model.policy.cfg.vocab_size
        assert torch.allclose(logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_sft_and_of_rl(dtype, tmp_path, monkeypatch):
    """From the command line, on a few problems; both leave a model that transformers loads."""
    if dtype == "bfloat16" and not (torch.cuda.is_available() or multiplies_bfloat16()):
        pytest.skip("without instructions for bfloat16 a CPU takes more than seven minutes")
    problems = []
    for i in range(2, 10):
        steps = [f"<<{i}+3={i + 3}>>", f"<<{i + 3}*2={2 * i + 6}>>"]
        question = f"Ann has {i} pens. She buys 3. Then she doubles them. How many pens has Ann?"
        problems.append({"question": question, "steps": steps, "answer": str(2 * i + 6)})
    (tmp_path / "p.json").write_text(json.dumps(problems))
    common = [
        *("--data", tmp_path / "p.json", "--val-size", 1, "--batch-size", 2),
        *("--dtype", dtype, "--max-new", 8, "--log-every", 1),
    ]

    # One step in the last stage, with every step of a problem latent
    go(
        *("--stage", "sft", "--init", DIRECTORY, "--K", 2, "--c", 1, "--decoder-layers", 2),
        *("--optimizer", "adamw", "--lr", 1e-4, "--epochs", "0,0,0,.2"),
        *(*common, "--out", tmp_path / "sft"),
    )
    records = records_of(tmp_path / "sft")
    assert [record["stage"] for record in records] == [3, 3]
    assert 0 < records[0]["enc"] < 9  # nats a word: a uniform guess over 49,155 words has 10.8

    # One update of RL. Whatever the chains are, their rewards differ
    n_judged = 0

    def reward(cfg, chain, answer):
        nonlocal n_judged
        n_judged += 1
        return float(n_judged), {"acc": 0.0, "coh": 0.0, "fmt": 0.0}

    monkeypatch.setattr(train, "chain_reward", reward)
    go(
        *("--stage", "rl", "--init", tmp_path / "sft", "--G", 2, "--updates", 1),
        *("--optimizer", "adamw", "--lr", 1e-6, "--anchor", 1),
        *(*common, "--out", tmp_path / "rl"),
    )
    record = records_of(tmp_path / "rl")[0]
    assert record["signal"] == 1
    assert record["grad_norm"] > 0

    # Both steps have changed π, and transformers reads what they have made of it
    start, after_sft, after_rl = (
        load_theirs(directory).model.layers[0].mlp.up_proj.weight
        for directory in (DIRECTORY, tmp_path / "sft" / "final", tmp_path / "rl" / "final")
    )
    assert not torch.equal(start, after_sft)
    assert not torch.equal(after_sft, after_rl)


def records_of(folder):
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
