"""The training loop from the command line: what a run writes; and that batching changes nothing."""
import json
from dataclasses import fields

import pytest
import torch

import sample
import train
from minatp import checkpoint, config, count, data, dry, evaluate, problems, sets
from minatp.explain import read_thoughts
from minatp.llama import KVCache
from minatp.rollout import Forced, Noise, rollout, score, sft_losses
from runs import go

SMALL = ("--n-layer 2 --n-embd 32 --n-inner 48 --labelled 160 --answers 40 --val-size 8 --test-size 24 --batch-size 8 --epochs .2 --K 2 --c 2 "
         "--decoder-layers 1 --optimizer adamw --log-every 2 --save-every 3 --device cpu").split()


@pytest.fixture(scope="module")
def atp(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "atp"
    go(*SMALL, "--out", out, "--votes", 2)
    return out


def test_a_run_leaves_what_others_rely_on(atp):
    summary = json.loads((atp / "summary.json").read_text())
    assert {"stage", "method", "seed", "n_problems", "accuracy", "accuracy_ci95", "latents", "answer_tokens", "tokens", "coherence",
            "seconds", "device"} <= summary.keys()
    assert (summary["stage"], summary["method"], summary["n_problems"], summary["sampled"]["k"]) == ("sft", "atp", 24, 2)
    records = [json.loads(line) for line in (atp / "metrics.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in records if "validation" in r] == [0, 1, 2, 3]
    assert {"enc", "dec", "kl", "stop", "loss", "lr", "grad_norm", "tokens_per_second"} <= records[-2].keys()
    assert {f.name for f in fields(options.Config)} == json.loads((atp / "config.json").read_text()).keys()
    names = {str(f.relative_to(atp)) for f in atp.rglob("*") if f.is_file()}
    assert {"final/config.json", "final/model.safetensors", "final/tokenizer.json", "final/minatp/heads.safetensors"} <= names
    assert all(n.endswith((".json", ".jsonl", ".safetensors")) for n in names)


@pytest.mark.parametrize("method", ["no-cot", "cot", "coconut", "sim-cot"])
def test_the_baselines_run_by_the_same_code(method, tmp_path):
    go(*SMALL, "--out", tmp_path, "--method", method, "--epochs", "0.1")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["method"], summary["latents"]) == (method, 4 if method in ("coconut", "sim-cot") else 0)
    model, _ = load_model(tmp_path)
    assert [hasattr(model, part) for part in ("decoder", "latent_head", "stop_head")] == [method == "sim-cot", False, False]


@pytest.mark.parametrize("ablation", ["--no-vae", "--no-stop", "--no-decoder"])
def test_the_ablations_run(ablation, tmp_path):
    go(*SMALL, "--out", tmp_path, ablation, "--epochs", "0.05")
    assert json.loads((tmp_path / "config.json").read_text())[ablation[2:].replace("-", "_")] is True


def test_accumulation_changes_nothing(atp):
    model, tokenizer = load_model(atp)
    grads = []
    for size in ("0", "3", "1"):  # 1 × 8, 3 × 3 and 8 × 1
        cfg = options.parse([*SMALL, "--micro-batch", size], "")
        rows = encode_problems(cfg, problems.generate("labelled", 8, 1), tokenizer, model)
        model.zero_grad()
        train.sft_gradients(cfg, model, tokenizer, rows, 3, 5, torch.device("cpu"))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for g in grads[1:]:
        assert (g - grads[0]).norm() / grads[0].norm() < 1e-6


def test_a_problem_without_steps_is_taught_to_stop_at_once(atp):
    model, tokenizer = load_model(atp)
    rows = data.encode([data.Problem("Ann has 5 pens. How many?", [], "5"), *problems.generate("labelled", 1, 1)], tokenizer, model.K, 512)
    alone, other, both = (data.collate(r, 2, model) for r in (rows[:1], rows[1:], rows))
    assert (alone.n_latent.tolist(), alone.asks.tolist(), alone.counts["stop"], alone.counts["free"]) == ([0], [True], 1, 0)
    a, b, ab = (sft_losses(model, batch) for batch in (alone, other, both))
    for name in ("enc", "stop"):
        assert a[name].item() > 0 and (a[name] + b[name]).item() == pytest.approx(ab[name].item(), rel=1e-5), name


def test_recomputing_activations_changes_nothing(atp):
    model, tokenizer = load_model(atp)
    cfg = options.parse(SMALL, "")
    rows = encode_problems(cfg, problems.generate("labelled", 8, 1), tokenizer, model)
    grads = []
    for on in (False, True):
        model.set_recompute(on).zero_grad()
        train.sft_gradients(cfg, model, tokenizer, rows, 3, 5, torch.device("cpu"))
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def ragged(run_folder):
    """(model, tokens) whose stops and answers end at all lengths: random weights, large enough to disagree."""
    model, tokenizer = load_model(run_folder)
    g = torch.Generator().manual_seed(3)
    for p in [*model.policy.parameters(), *model.stop_head.parameters(), model.latent_head.gaussian.weight]:
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4, generator=g)
    torch.nn.init.zeros_(model.stop_head[2].bias)
    model.policy.cfg.eos = tuple(range(1, 300, 2))  # every other token ends
    tokenizer.eos = model.policy.cfg.eos
    return model, tokenizer


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_result_does_not_depend_on_its_neighbours(atp, temperature):
    model, tokenizer = ragged(atp)
    prompts = [tokenizer.prompt(p.question) for p in problems.generate("test", 17, 3)]
    solve = lambda size: evaluate.solve(model, tokenizer, prompts, 12, size, seed=5 if temperature else None, temperature=temperature or 1)
    whole = solve(17)
    for size in (1, 4):
        for a, b in zip(whole, solve(size)):
            assert (a.text, a.thoughts, a.n_latent, a.n_token, a.ended) == (b.text, b.thoughts, b.n_latent, b.n_token, b.ended)
            assert a.sigma == pytest.approx(b.sigma, rel=1e-4) and a.stop_prob == pytest.approx(b.stop_prob, rel=1e-3)
    assert len({c.n_latent for c in whole}) > 1 and len({c.n_token for c in whole}) > 1  # ragged, or nothing was tested


@pytest.mark.parametrize("group, spread", [(1, 1.0), (3, 2.5)])
def test_score_is_what_the_rollout_recorded(atp, group, spread):
    model, tokenizer = ragged(atp)
    prompts = [tokenizer.prompt(p.question) for p in problems.generate("test", 9, 4)]
    prompt, valid = data.left_pad(prompts, tokenizer.end)
    r = rollout(model, prompt, valid, 6, Noise.draw(model, 9 * group, 6, 1, 0.7, spread).at(slice(None), "cpu"), group)
    assert r.stopped.any() and not r.stopped.all()
    for got, want in zip(score(model, prompt, valid, r, group), (r.logp_z, r.logp_stop, r.logp_token)):
        torch.testing.assert_close(got.detach(), want, rtol=1e-4, atol=1e-4)


def test_finished_rows_cost_nothing(atp, monkeypatch):
    """Work is counted: positions that the policy reads per row are the row's own latents and tokens, not the longest row's."""
    model, tokenizer = ragged(atp)
    prompts = [tokenizer.prompt(p.question) for p in problems.generate("test", 9, 4)]
    read, forward = [], type(model.policy).forward
    monkeypatch.setattr(type(model.policy), "forward", lambda self, x, *a: read.append((self, x.shape[0] * x.shape[1])) or forward(self, x, *a))
    chains = evaluate.solve(model, tokenizer, prompts, 12)
    steps = sum(n for m, n in read[1:] if m is model.policy)
    assert steps == sum(c.n_latent + c.n_token for c in chains)  # <|end-latent|> is read and the last token is not


@pytest.mark.parametrize("sampled", [False, True])
def test_ticks_of_fixed_shape_do_the_same_and_wait_for_nothing(atp, monkeypatch, sampled):
    """As on a GPU: every row is computed, and what it may keep is kept. Chains of all lengths, some with thoughts that they are given."""
    model, tokenizer = ragged(atp)
    prompt, valid = data.left_pad([tokenizer.prompt(p.question) for p in problems.generate("test", 6, 4)], tokenizer.end)
    noise = Noise.draw(model, 12, 5, 1).at(slice(None), "cpu") if sampled else None
    z = torch.randn(12, 4, model.policy.cfg.n_embd, generator=torch.Generator().manual_seed(2))
    given = Forced(z, torch.tensor([0, 2, 4] * 4), torch.arange(12) > 6)
    eos = int(read_thoughts(model.decoder, z[:1, :2], -1, 5)[0][2])  # a word that φ writes
    works = [lambda: rollout(model, prompt, valid, 5, noise, 2), lambda: rollout(model, prompt, valid, 5, noise, 2, given),
             lambda: read_thoughts(model.decoder, z[:, :2], eos, 5)]
    want = [work() for work in works]
    assert len({*want[0].n_latent.tolist()}) > 1 < len({*want[0].n_token.tolist()}) and len({*map(len, want[2])}) > 1
    monkeypatch.setattr(KVCache, "replays", True)
    for module in ("explain", "rollout"):
        monkeypatch.setattr(f"minatp.{module}.Late", lambda late: lambda mask: 0)  # the host never learns that a row is done
    got = []
    for work in works:
        assert count.count(lambda: got.append(work())).waits == 1  # for the longest answer, and for the text
    assert got[2] == want[2]
    for x, y in zip(got[:2], want):
        for name in ("n_latent", "stopped", "token", "n_token", "z", "logvar", "stop_prob", "logp_z", "logp_stop", "logp_token"):
            torch.testing.assert_close(getattr(x, name), getattr(y, name), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_curriculum_order_and_steps(atp):
    records = [json.loads(line) for line in (atp / "metrics.jsonl").read_text().splitlines()]
    stages = [r["stage"] for r in records]
    assert stages == sorted(stages) and max(r["step"] for r in records) == 16


def test_a_decoder_starts_as_the_policy_that_thinks_first(tmp_path):
    go(*SMALL, "--epochs", "1,0,0,0", "--out", tmp_path)
    model, _ = load_model(tmp_path)
    policy = model.policy.state_dict()
    assert all(torch.equal(p, policy[name]) for name, p in model.decoder.state_dict().items())


def test_a_thought_is_read_to_the_end_of_the_longest_that_was_taught(tmp_path, monkeypatch):
    """The K-th thought stands for all steps that are left."""
    go(*SMALL, "--K", 1, "--epochs", "0,0,1", "--out", tmp_path)
    model, tokenizer = load_model(tmp_path)
    texts = [r.rest for r in encode_problems(options.of_run(tmp_path / "config.json"), problems.generate("labelled", 60, 0), tokenizer, model)]
    assert model.longest == max(map(len, texts)) > 24
    asked = []
    monkeypatch.setattr(evaluate, "read_thoughts", lambda decoder, z, eos, max_new: asked.append(max_new) or [[eos]] * len(z))
    evaluate.solve(model, tokenizer, [tokenizer.prompt("Ann has 5 pens.")], 4)
    assert asked == [model.longest]


def test_external_data_and_init(atp, tmp_path, capsys):
    """Fine-tune an earlier run on a file of one's own; held-out questions are not trained on."""
    ps = problems.generate("labelled", 60, 9)
    (tmp_path / "p.txt").write_text("".join(f"{p.question}||{' '.join(p.steps)} #### {p.answer}\n" for p in ps + ps[:5]))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(vars(p)) + "\n" for p in ps[:7]))
    common = ["--data", tmp_path / "p.txt", "--test", tmp_path / "t.jsonl", "--val-size", 6, "--K", 2, "--c", 2, "--batch-size", 8, "--epochs", 0.2]
    go(*common, "--init", atp, "--out", tmp_path / "o")
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert list(summary["tests"]) == ["t.jsonl"] and summary["n_problems"] == 7 and summary["training_problems"] <= 60 - 7
    assert "left out of training:" in capsys.readouterr().out
    go(*common, "--dry-run", "--out", tmp_path / "never")
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("tokens      ", "question    ", "parameters  ", "memory      ", "forward pass of 8 longest", "stage 0 ("))
    assert "one step    stage 3" in shown and "stage 1" in shown and not (tmp_path / "never").exists()


def test_a_model_too_large_to_build_is_counted(tmp_path, capsys, monkeypatch):
    (tmp_path / "p.json").write_text(json.dumps([{"question": f"q{i}", "steps": ["<<1=" + "9" * 400 + ">>"], "answer": str(i)} for i in range(9)]))
    monkeypatch.setattr(dry, "memory", lambda device: 2**30)
    go("--preset", "llama-1b", "--data", tmp_path / "p.json", "--val-size", 2, "--dry-run", "--out", tmp_path / "never")
    shown = capsys.readouterr().out
    assert "policy 1,235,814,400" in shown and "one step    not run: it does not fit here" in shown and "do not end on a step" in shown


def test_a_saved_model_too_large_for_the_device_is_counted(atp):
    model, tokenizer = load_model(atp)
    row, = data.encode(problems.generate("labelled", 1, 0), tokenizer, model.K, 512)
    cfg = options.parse(["--init", str(atp)], "")
    assert dry.activations(cfg, model, tokenizer, row, torch.device("cuda"), [model.K + 1]) > 0  # it was left on the CPU


# ---- sample.py ----------------------------------------------------------------------------------------------------------

def test_sample_shows_thoughts(atp, capsys, monkeypatch):
    assert guarded(sample.main, ["--run", str(atp), "--problems", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("→") == 2 and "tokens/s" in shown and "\x1b[" not in shown
    assert guarded(sample.main, ["--run", str(atp), "Ann has 5 pens. How many?", "--n", "3", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 3 and all(len(r["sigma"]) == len(r["thoughts"]) == r["latents"] // 2 for r in records)
    for by in ("majority", "coherence"):  # one of the three speaks, a question without an answer
        assert guarded(sample.main, ["--run", str(atp), "Ann has 5 pens. How many?", "--n", "3", "--vote", by, "--json"]) == 0
        elected, = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        assert elected in records and elected["right"] is None
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("One?\n\nTwo?\n"))
    assert guarded(sample.main, ["--run", str(atp), "-", "--json"]) == 0
    assert [json.loads(line)["question"] for line in capsys.readouterr().out.splitlines()] == ["One?", "Two?"]
