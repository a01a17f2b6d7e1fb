"""The page, the edits, the probes, the curves and the sinks: what is shown is what happened, and nothing of it is markup."""
import json
import re
from html.parser import HTMLParser

import pytest
import torch

import sample
import train
from minatp import checkpoint, config, data, edit, evaluate, explain, page, plot, probe, problems
from minatp.data import Problem
from minatp.folder import Log
from minatp.rollout import Forced, rollout
from test_sft import SMALL, ragged

EVIL = 'Ann </script><script>alert(1)</script> <img src=x onerror=alert(2)> & "5" pens \u2028 — how many?'


def ok(main, *argv, expect=0):
    assert guarded(main, [str(a) for a in argv]) == expect


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of a few steps, its weights then made large enough for chains of all lengths that disagree."""
    out = tmp_path_factory.mktemp("page") / "run"
    ok(train.main, *SMALL, "--out", out, "--epochs", "0.1", "--test-size", 4, "--answers", 4, "--seed", 1)
    model, tokenizer = ragged(out)
    save_model(out / "final", model, tokenizer)
    return out


@pytest.fixture(scope="module")
def solved(folder):
    """(model, tokens, prompts, the mean chains with their latents) of 24 problems."""
    model, tokenizer = load_model(folder)
    prompts = [tokenizer.prompt(p.question) for p in problems.generate("test", 24, 0)]
    chains = evaluate.solve(model, tokenizer, prompts, 6, keep=True)
    assert {c.n_latent for c in chains} == {0, 2, 4}
    return model, tokenizer, prompts, chains


# ---- given thoughts, edits ----------------------------------------------------------------------------------------------

def test_its_own_thoughts_given_back_change_nothing(solved):
    model, tokenizer, prompts, mean = solved
    z, n = torch.zeros(24, 4, 32), torch.tensor([c.n_latent for c in mean])
    for i, c in enumerate(mean):
        z[i, : n[i]] = c.z
    for part in (n, n.clamp(max=2)):  # all of them, or the first one alone
        for ends in (part == n, torch.zeros_like(n).bool()):
            again = evaluate.solve(model, tokenizer, prompts, 6, 5, given=Forced(z, part, ends), keep=True)
            assert [(a.text, a.thoughts, a.n_latent) for a in again] == [(m.text, m.thoughts, m.n_latent) for m in mean]


def test_given_thoughts_are_taken_and_nothing_before_their_end_stops(solved):
    model, tokenizer, prompts, _ = solved
    z = torch.randn(24, 4, 32, generator=torch.Generator().manual_seed(1))
    n = torch.tensor([0, 2, 4] * 8)
    for ends in (True, False):
        r = rollout(model, *data.left_pad(prompts, tokenizer.end), 6, given=Forced(z, n, torch.full((24,), ends)))
        assert all(torch.equal(r.z[i, : n[i]], z[i, : n[i]]) for i in range(24))
        assert torch.equal(r.n_latent, n) if ends else (r.n_latent >= n).all() and (r.n_latent > n).any() and (r.n_latent < 4).any()


def test_edits_change_the_chain_as_they_say(solved):
    model, _, _, mean = solved
    long = [i for i, c in enumerate(mean) if c.n_latent == 4]
    steps = {i: mean[i].z.split(2) for i in long}
    words = mean[long[0]].thoughts[1]
    for text, want, ends in (("drop 1", lambda s: [s[1]], True), ("drop 2", lambda s: [s[0]], True),
                             ("swap 1 2", lambda s: [s[1], s[0]], False), ("replace 2 zero", lambda s: [s[0], 0 * s[1]], False),
                             (f"replace 1 {words}", lambda s: [steps[long[0]][1]], False)):
        given, applies = edit.given(edit.parse(text), model, mean, [mean[long[0]]])
        for i in long:
            new = torch.cat(want(steps[i]))
            assert torch.equal(given.z[i, : given.n[i]], new) and given.n[i] == len(new) and given.ends[i] == ends and applies[i], text
        short = [i for i, c in enumerate(mean) if c.n_latent == 0]
        assert not any(applies[i] for i in short) and given.ends[short].all() and (given.n[short] == 0).all()
    given, applies = edit.given(edit.parse("replace 1 next"), model, mean, mean)
    assert [i for i in range(24) if applies[i]] == [i for i in range(24) if mean[i].n_latent and mean[(i + 1) % 24].n_latent]
    i = applies.index(True)
    assert torch.equal(given.z[i, :2], mean[i + 1].z[:2])
    a, b = (edit.given(edit.parse("replace 1 prior"), model, mean, mean, seed)[0].z[long, :2] for seed in (0, 0))
    assert torch.equal(a, b) and 0.7 < a.std() < 1.3


@pytest.mark.parametrize("text", ["drop", "drop 0", "drop 1 2", "swap 1", "swap 2 2", "replace 1", "shuffle 1 2", "drop x", ""])
def test_what_is_not_an_edit(text):
    with pytest.raises(UserError, match="is not an edit; write"):
        edit.parse(text)


@pytest.mark.parametrize("argv, message", [
    (["--edit", "drop 3"], "no chain has a thought 3"), (["--edit", "replace 1 <<0+0=7>>"], "or of others, is read as '<<0+0=7>>'"),
    (["--edit", "replace 1 next", "--problems", "1", "--seed", "2"], "there is no next problem"),
    (["--edit", "drop 1", "--n", "3"], "does not go with --n"), (["--html", "x.html", "--json"], "does not go with --json"),
    (["--html", "/nowhere/x.html"], "/nowhere/x.html:0: cannot be written"),
])
def test_mistakes_get_one_line(argv, message, folder, capsys):
    ok(sample.main, "--run", folder, "--problems", 8, "--max-new", 4, *argv, expect=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_words_for_an_edit_can_come_from_the_problems_shown(folder, tmp_path, capsys, monkeypatch):
    """Of a run on data of one's own, which brings no test set."""
    def none(*a):
        raise UserError("none")

    monkeypatch.setattr(sample.sets, "test_set", none)
    (tmp_path / "f").write_text("".join(p.question + "\n" for p in problems.generate("test", 8, 0)))
    ok(sample.main, "--run", folder, "--file", tmp_path / "f", "--problems", 8, "--max-new", 4, "--json")
    words = next(t for line in capsys.readouterr().out.splitlines() for t in json.loads(line)["thoughts"] if t.strip() and "\n" not in t)
    ok(sample.main, "--run", folder, "--file", tmp_path / "f", "--problems", 8, "--max-new", 4, "--edit", f"replace 1 {words}")


def test_every_thought_keeps_its_own_numbers():
    """Empty ones, and those of several lines, too; the stop stands between thoughts and words."""
    chain = evaluate.Chain(["", "<<1+1=2>>\nmore"], "<<2+1=3>>\n### 3", True, 4, 9, [0.1, 0.2, 0.9], [0.01, 0.02])
    empty, second, rest, stop, written, answer = sample.draw(data.Problem("q", [], "3"), chain, 2, sample.Paint(False))
    assert "stop 0.100  σ 0.010" in empty and "<<1+1=2>>" in second and "used    stop 0.200  σ 0.020" in second
    assert "more" in rest and "stop" not in rest and stop.startswith("  ■") and "0.900" in stop
    assert written.startswith("  · <<2+1=3>>") and "used" in written and answer == "  → 3  ✓"


def test_edits_in_the_terminal(folder, capsys):
    ok(sample.main, "--run", folder, "--problems", 8, "--max-new", 4, "--edit", "drop 1", "--edit", "swap 1 2", "--json")
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    whole = {r["question"]: r for r in records if not r["edit"]}
    dropped = [r for r in records if r["edit"] == "drop 1"]
    assert len(whole) == 8 and len(dropped) == sum(r["latents"] > 0 for r in whole.values())
    assert all(r["thoughts"] == whole[r["question"]]["thoughts"][1:] for r in dropped)
    ok(sample.main, "--run", folder, "--problems", 8, "--max-new", 4, "--edit", "drop 1")
    shown = capsys.readouterr().out
    told = re.search(r"run · drop 1: another answer in (\d+) of (\d+)", shown)
    changed = sum(r["text"] != whole[r["question"]]["text"] for r in dropped)
    assert (int(told[1]), int(told[2])) == (changed, len(dropped)) and shown.count("does not apply") == 8 - len(dropped)


# ---- the page -----------------------------------------------------------------------------------------------------------

class Parsed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.style, self.inside = [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        if self.inside == "script":
            self.scripts.append(text)
        if self.inside == "style":
            self.style += text

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def parsed(folder, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("html")
    ps = problems.generate("test", 11, 0) + [Problem(EVIL, [], "<b>5</b>")]
    (tmp / "p.jsonl").write_text("".join(json.dumps(vars(p)) + "\n" for p in ps))
    ok(sample.main, "--run", f"{folder},{folder}/final", "--run", min((folder / "checkpoints").iterdir()), "--file", tmp / "p.jsonl",
       "--html", tmp / "t.html", "--edit", "drop 1", "--n", 3, "--max-new", 6)
    return Parsed((tmp / "t.html").read_text())


def test_the_page_asks_nothing_of_the_network(parsed):
    assert {"link", "img", "iframe", "object", "base", "source"}.isdisjoint(tag for tag, _ in parsed.tags)
    assert not [a for _, a in parsed.tags if {"src", "href", "action", "srcset"} & a.keys()]
    assert not re.search(r"@import|url\(", parsed.style)
    code = parsed.scripts[1]
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import|sendBeacon|innerHTML|eval)\b", code)
    assert set(re.findall(r"https?://[^\s\"']+", code)) == {"http://www.w3.org/2000/svg"}  # a name, not a place
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_text_of_users_is_data(parsed):
    template = Parsed((page.Path(page.__file__).with_suffix(".html")).read_text())
    assert [t for t, _ in parsed.tags] == [t for t, _ in template.tags] and parsed.scripts[1:] == template.scripts[1:]
    assert (parsed.data["problems"][-1]["question"], parsed.data["problems"][-1]["gold"]) == (EVIL, "<b>5</b>")
    assert "<" not in parsed.scripts[0] and "\u2028" not in parsed.scripts[0]


def test_the_page_tells_what_happened(parsed, folder):
    found = parsed.data
    names = [v["name"] for v in found["views"]]
    assert names[:2] == [str(folder), f"{folder} · drop 1"] and len(names) == 6 and names[4].isdigit() and len(found["planes"]) == 3
    assert [v["edited"] for v in found["views"]] == [[]] * 6 and edit.parse("swap 3 1").places == [2, 0]
    model, tokenizer = load_model(folder)
    ps = problems.generate("test", 11, 0)
    mean = evaluate.solve(model, tokenizer, [tokenizer.prompt(p.question) for p in ps], 6)
    for p, c in zip(found["problems"], mean):
        shown = p["chains"][0]
        thoughts = [r for r in shown["rows"] if "thought" in r]
        assert [r["text"] for r in shown["rows"] if r["text"]] == c.steps and (shown["text"], shown["latents"]) == (c.text, c.n_latent)
        assert [r["sigma"] for r in thoughts if "sigma" in r] == pytest.approx(c.sigma, abs=1e-3)
        asked = [r["stop"] for r in thoughts if "stop" in r] + ([shown["stop"]] if shown["stop"] is not None else [])
        assert asked == pytest.approx(c.stop_prob, abs=1e-3)
        assert len(shown["path"]) == c.n_latent // 2 and len(shown["sampled"]) == 3
        assert (p["chains"][1] is None) == (c.n_latent == 0)
    assert sum(len(p["chains"][0]["path"]) for p in found["problems"]) == len(found["planes"][0]["points"])
    assert max(abs(v) for p in found["planes"][0]["points"] for v in p[:2]) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("has", ["nothing", "a stop head", "words alone"])
def test_runs_without_decoder_or_thoughts_have_a_page(has, folder, tmp_path, capsys):
    model, tokenizer = load_model(folder, vae=False, decode=False, stop=has == "a stop head")
    model.stage = 0 if has == "words alone" else 3
    save_model(tmp_path / "r", model, tokenizer)
    ok(sample.main, "--run", tmp_path / "r", "--html", tmp_path / "t.html", "--problems", 6, "--max-new", 4, "--n", 2)
    found = Parsed((tmp_path / "t.html").read_text()).data
    rows = [r for p in found["problems"] for r in p["chains"][0]["rows"] if "thought" in r]
    if has == "words alone":
        assert not rows and not found["planes"]
    else:
        assert rows and all(r["text"] == "" and r["p"] is None and len(r["or"]) == 3 for r in rows) and found["planes"][0]["points"]
    ok(sample.main, "--run", tmp_path / "r", "--problems", 6, "--max-new", 4, "--edit", "replace 1 prior", expect=2)
    assert ("no thoughts to edit" if has == "words alone" else "no prior") in capsys.readouterr().err
    ok(probe.main, tmp_path / "r", "--problems", 12, "--max-new", 4, "--json", expect=2 if has == "words alone" else 0)
    out, err = capsys.readouterr()
    assert "thinks in words" in err if has == "words alone" else "prior" not in out and json.loads(out)["using"][0]["latents"] > 0


def test_links_join_a_result_to_its_use():
    thoughts, z = ["<<2+3=5>>", "<<1+1=2>>\n<<5*2=10>>"], torch.zeros(4, 8)
    chain = evaluate.Chain(thoughts, "<<10-9=1>>\n### 10", True, 4, 3, [0.1, 0.2], [0.3, 0.4], z)
    view = page.View("r", "", [chain], [], [[[("<<2+3=5>>", 0.8), ("<<2+3=6>>", 0.1)], []]], 2, None)
    shown = page.chain_record(view, 0, Problem("?", [], "10"))
    assert [(r["text"], r.get("sigma"), r.get("stop")) for r in shown["rows"]] == [
        ("<<2+3=5>>", 0.3, 0.1), ("<<1+1=2>>", 0.4, 0.2), ("<<5*2=10>>", None, None), ("<<10-9=1>>", None, None)]
    assert shown["links"] == [[0, 2], [1, 2], [2, 3], [2, 4]] and shown["right"]
    assert (shown["rows"][0]["p"], shown["rows"][0]["or"]) == (0.8, [["<<2+3=6>>", 0.1]])
    kinds = {"<<2+3=5>>": ("+", 5), "<<6/2=3>>": ("/", 3), "so 4×2.5=10": ("*", 10), "none": ("", None), "=7": ("", 7)}
    assert {t: page.kind(t) for t in kinds} == kinds


def test_the_plane_is_pca():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(40, 2, 8, generator=g) * torch.tensor([5.0, 1, 1, 3, 1, 1, 1, 1])
    z[:, 1] *= 0.1
    chains = [evaluate.Chain([], "", True, 2, 0, [], [], pair) for pair in z]
    plane = page.Plane.fit(chains, 2)
    x = z.reshape(40, 16)
    values, vectors = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)))
    assert plane.share == pytest.approx([float(v / values.sum()) for v in values.flip(0)[:2]], rel=1e-4)
    got = torch.tensor([plane.path(c, 2)[0] for c in chains])
    want = (x - x.mean(0)) @ vectors[:, [-1, -2]]
    corr = (got * want).sum(0) / got.norm(dim=0) / want.norm(dim=0)
    assert corr.abs().min() > 0.999 and page.Plane.fit(chains[:2], 2) is None


@torch.no_grad()
def test_readings_are_the_likeliest(solved):
    """Every reading has the probability that φ gives it; the first is no less likely than the greedy one; all differ."""
    model, tokenizer, _, mean = solved
    z = torch.cat([c.z for c in mean]).unflatten(0, (-1, 2))
    found = decoder.readings(model.decoder, z, tokenizer.eos[0], n=3, max_new=6)
    n = 0
    for thought, told in zip(z, found):
        assert [p for _, p in told] == sorted((p for _, p in told), reverse=True) and len({tuple(ids) for ids, _ in told}) == len(told)
        for ids, p in told:
            text = torch.tensor([ids + [tokenizer.eos[0]]])
            assert p == pytest.approx(float((-decoder.thought_nll(model.decoder, thought[None], text)).exp()), rel=1e-3, abs=1e-9)
            n += 1
    assert n > len(z)
    greedy = decoder.read_thoughts(model.decoder, z, tokenizer.eos[0], 6)
    ended = [(ids, told) for ids, told in zip(greedy, found) if len(ids) < 6]
    for ids, told in ended:
        p = float((-decoder.thought_nll(model.decoder, z[found.index(told)][None], torch.tensor([ids + [tokenizer.eos[0]]]))).exp())
        assert told[0][1] >= p * (1 - 1e-4)


# ---- probes -------------------------------------------------------------------------------------------------------------

def test_the_probe_finds_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    group = torch.arange(900) // 3
    y = torch.randint(1, 6, (900,), generator=g).double()
    noise = torch.randn(900, 10, generator=g).double()
    told = torch.cat((torch.eye(6)[y.long()].double() @ torch.randn(6, 10, generator=g).double() + 0.05 * noise, noise), 1)
    there, absent = probe.probe(told, y, group), probe.probe(noise, y, group)
    assert there["accuracy"] > 0.99 and there["r2"] > 0.97 and (there["n_steps"], there["n_problems"], there["n_values"]) == (300, 100, 5)
    assert absent["accuracy"] < 0.3 and absent["r2"] < 0.05 and absent["accuracy_ci95"][0] < 0.2 < absent["accuracy_ci95"][1]
    assert probe.r2(y, y) == 1 and probe.r2(y * 0 + y.mean(), y) == pytest.approx(0)


def test_a_problem_is_never_in_both_halves():
    """x names its problem and tells nothing else: a fit that had seen the problem would know the answer."""
    group = torch.arange(600) // 4
    y = (group * 7 % 5).double()
    assert probe.probe(torch.eye(150).double()[group], y, group)["accuracy"] < 0.45


def test_the_probe_of_a_run(folder, capsys):
    ok(probe.main, folder, "--problems", 24, "--max-new", 6, "--json")
    report = json.loads(capsys.readouterr().out)
    rows = {r["thoughts"]: r for r in report["using"]}
    own, other, zero, prior, none = list(rows.values())[:5]
    assert (own["thoughts"], prior["thoughts"], none["thoughts"]) == ("as they are", "thoughts drawn from the prior", "no thoughts")
    assert all(r["n_problems"] == 24 and r["accuracy_ci95"][0] <= r["accuracy"] <= r["accuracy_ci95"][1] for r in rows.values())
    assert own["latents"] == zero["latents"] == other["latents"] == prior["latents"] > 0 == none["latents"]
    assert own["same_answer"] == 1 > max(zero["same_answer"], rows["σ × 8"]["same_answer"])
    shown = probe.table(report)
    assert shown.count("\n") >= 12 and "no thoughts" in shown and "the other problem's answer:" in shown
    ok(probe.main, folder, "--problems", 3, expect=2)
    assert "--problems must be at least 10" in capsys.readouterr().err


def test_saved_runs_are_measured_side_by_side(folder, solved, tmp_path, capsys):
    model, tokenizer, prompts, chains = solved
    wrong = problems.generate("test", 24, 0)  # what the run answers is right in every other problem alone
    rows = [{"question": p.question, "steps": p.steps, "answer": c.answer if c.answer and i % 2 else "no"} for i, (p, c) in enumerate(zip(wrong, chains))]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    ok(evaluate.main, folder, folder / "final", "--file", tmp_path / "p.json", "--max-new", 6, "--votes", 3, "--json")
    a, b = map(json.loads, capsys.readouterr().out.splitlines())
    assert a["accuracy"] == sum(r["answer"] != "no" for r in rows) / 24 == b["accuracy"] and (b["gain"], b["gain_se"]) == (0, 0)
    assert a["sampled"]["k"] == 3 and a["sampled"]["pass"] >= a["sampled"]["majority"] and "gain" not in a
    ok(evaluate.main, folder, "--longer", "--problems", 9, "--max-new", 6)
    assert "of 9 solved" in capsys.readouterr().out
    ok(evaluate.main, folder, "--longer", "--file", "x", expect=2)
    assert "not both" in capsys.readouterr().err


# ---- curves and sinks ---------------------------------------------------------------------------------------------------

def test_curves_have_every_quantity(folder, tmp_path, capsys, monkeypatch):
    found = plot.read(folder / "metrics.jsonl")
    assert {"enc", "dec", "stop", "kl.sft", "accuracy.stage", "latents"} <= found.keys()
    assert [stage for stage, *_ in found["accuracy.stage"]] == [0, 1, 2, 3]
    rl = plot.curves([{"step": 5, "reward": 0.4, "acc": 0.3, "coh": 0.1, "fmt": 0.9, "kl": 0.01, "latents": 3.0}])
    assert rl.keys() == {"reward", "acc", "coh", "fmt", "kl.rl"} and rl["acc"] == [(5, 0.3, None, None)]
    pytest.importorskip("matplotlib")
    ok(plot.main, folder / "metrics.jsonl", folder, "-o", tmp_path / "c.svg")
    shown = (tmp_path / "c.svg").read_text()
    assert shown.count('<g id="axes_') == 4 * -(-len(found) // 4) and 'id="legend_1"' in shown
    with monkeypatch.context() as inside:
        inside.chdir(folder)
        ok(plot.main, "metrics.jsonl", "-o", tmp_path / "c")
    assert (tmp_path / "c.png").exists() and capsys.readouterr().out.endswith("c.png\n")
    ok(plot.main, folder, "-o", tmp_path / "c.xyz", expect=2)
    assert "c.xyz:0: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [("", ":1: is empty"), ('{"step": 1}\n{"st\n', ":2: is not valid JSON"),
                                           ('{"step": 1}\n{"st', ":1: has no losses"), ('{"step": 1, "validation": {}}\n', ":0: has a record that no run"),
                                           ('{"step": 1, "stage": 0, "validation": null}\n', ":0: has a record that no run"),
                                           ("[1]\n", ':1: has no "step"'), ("[" * 100_000, ":1: is not valid JSON"),
                                           ("7" * 5000, ":1: is not valid JSON"), (None, ":0: cannot be read")])
def test_broken_metrics_are_named(text, message, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    ok(plot.main, tmp_path / "metrics.jsonl", "-o", tmp_path / "c.png", expect=2)
    err = capsys.readouterr().err
    assert "metrics.jsonl" + message in err and err.count("\n") == 1


def hide(monkeypatch, name):
    for module in [m for m in __import__("sys").modules if m.split(".")[0] == name or m == "torch.utils.tensorboard"]:
        monkeypatch.delitem(__import__("sys").modules, module)
    monkeypatch.setitem(__import__("sys").modules, name, None)


def test_what_is_missing_is_said_in_a_line(folder, tmp_path, monkeypatch, capsys):
    for package in ("tensorboard", "wandb"):
        hide(monkeypatch, package)
        ok(train.main, *SMALL, "--answers", 4, "--out", tmp_path / "o", "--sink", package, expect=2)
        err = capsys.readouterr().err
        assert f"--sink {package} needs the package {package}" in err and err.count("\n") == 1
    hide(monkeypatch, "matplotlib")
    ok(plot.main, folder, expect=2)
    assert capsys.readouterr().err == "command line: minatp.plot needs matplotlib, which is not installed; pip install matplotlib\n"
    ok(train.main, "--sink", "paper", expect=2)
    assert "--sink must be tensorboard or wandb, not 'paper'" in capsys.readouterr().err


def test_sinks_get_the_records_of_the_file(tmp_path, monkeypatch):
    sent, wandb = [], type(__import__("sys"))("wandb")
    wandb.init, wandb.log = lambda **how: sent.append(how), lambda values, step: sent.append((step, values))
    monkeypatch.setitem(__import__("sys").modules, "wandb", wandb)
    cfg = options.parse(["--out", str(tmp_path / "o"), "--sink", "wandb"], "")
    (tmp_path / "o").mkdir()
    log = Log(cfg, {"step": 0, "seconds": 0.0})
    log.write({"step": 3, "loss": 0.5, "validation": {"accuracy": 0.25, "accuracy_ci95": [0.1, 0.4], "coherence": None}})
    assert sent[0]["project"] == "minatp" and sent[0]["config"]["sink"] == "wandb"
    assert sent[1] == (3, {"loss": 0.5, "validation/accuracy": 0.25, "validation/accuracy_ci95/0": 0.1, "validation/accuracy_ci95/1": 0.4})
