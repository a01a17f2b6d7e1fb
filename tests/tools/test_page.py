"""The page of sample.py --html: what it shows is what happened, and no text in it is markup."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

import sample
from minatp import problems
from minatp.decoder import Chain, read_thoughts, thought_nll
from minatp.problems import Problem
from minatp.run import evaluate
from minatp.run.huggingface import load_model, save_model
from minatp.tools import page, probe, show

from commands import run

EVIL = (
    'Ann </script><script>alert(1)</script> <img src=x onerror=alert(2)> & "5" pens \u2028 — how?'
)


class Parsed(HTMLParser):
    """A page, as a browser would take it apart."""

    def __init__(self, text):
        super().__init__()
        self.tags = []  # (tag, attributes)
        self.scripts = []  # the data, then the code
        self.style = ""
        self.inside = ""
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
    """A page of twelve problems, the last of them evil, with three runs and an edit of each."""
    out = tmp_path_factory.mktemp("html")
    asked = [*problems.generate("test", 11, 0), Problem(EVIL, [], "<b>5</b>")]
    (out / "p.jsonl").write_text("".join(json.dumps(vars(p)) + "\n" for p in asked))
    oldest_checkpoint = min((folder / "checkpoints").iterdir())
    runs = ["--run", f"{folder},{folder}/final", "--run", oldest_checkpoint]
    options = ["--edit", "drop 1", "--n", 3, "--max-new", 6]
    run(sample.main, *runs, "--file", out / "p.jsonl", "--html", out / "t.html", *options)
    return Parsed((out / "t.html").read_text())


# ---- the file ------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_the_network(parsed):
    loading_tags = {"link", "img", "iframe", "object", "base", "source"}
    loading_attributes = {"src", "href", "action", "srcset"}
    assert loading_tags.isdisjoint(tag for tag, _ in parsed.tags)
    assert all(loading_attributes.isdisjoint(attributes) for _, attributes in parsed.tags)
    assert not re.search(r"@import|url\(", parsed.style)

    code = parsed.scripts[1]
    calls = r"\b(fetch|XMLHttpRequest|WebSocket|import|sendBeacon|innerHTML|eval)\b"
    assert not re.search(calls, code)
    addresses = set(re.findall(r"https?://[^\s\"']+", code))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place

    metas = [attributes for tag, attributes in parsed.tags if tag == "meta"]
    policy = next(meta["content"] for meta in metas if "http-equiv" in meta)
    allowed = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert policy == allowed


def test_text_of_users_is_data(parsed):
    template = Parsed(page.Path(page.__file__).with_suffix(".html").read_text())
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in template.tags]
    assert parsed.scripts[1:] == template.scripts[1:]

    evil = parsed.data["problems"][-1]
    assert (evil["question"], evil["gold"]) == (EVIL, "<b>5</b>")
    assert "<" not in parsed.scripts[0]
    assert "\u2028" not in parsed.scripts[0]


# ---- what it shows -------------------------------------------------------------------------------


def test_the_page_has_a_column_for_each_run_and_edit(parsed, folder):
    views, planes = parsed.data["views"], parsed.data["planes"]
    names = [view["name"] for view in views]
    assert names[:2] == [str(folder), f"{folder} · drop 1"]
    assert len(names) == 6
    assert names[4].isdigit()  # a checkpoint
    assert len(planes) == 3
    assert [view["edited"] for view in views] == [[]] * 6  # a dropped thought leaves no mark


def test_the_page_shows_what_happened(parsed, folder):
    model, tokenizer = load_model(folder)
    prompts = [tokenizer.prompt(p.question) for p in problems.generate("test", 11, 0)]
    mean = evaluate.solve(model, tokenizer, prompts, 6)
    for problem, chain in zip(parsed.data["problems"], mean):
        shown, dropped = problem["chains"][:2]
        rows, thoughts = shown["rows"], [row for row in shown["rows"] if "thought" in row]
        assert [row["text"] for row in rows if row["text"]] == chain.steps
        assert (shown["text"], shown["latents"]) == (chain.text, chain.n_latent)

        sigma = [row["sigma"] for row in thoughts if "sigma" in row]
        assert sigma == pytest.approx(chain.sigma, abs=1e-3)
        stop = [row["stop"] for row in thoughts if "stop" in row]
        if shown["stop"] is not None:
            stop.append(shown["stop"])
        assert stop == pytest.approx(chain.stop_prob, abs=1e-3)

        assert len(shown["path"]) == chain.n_latent // 2
        assert len(shown["sampled"]) == 3
        assert (dropped is None) == (chain.n_latent == 0)


def test_the_plane_has_every_thought_and_fills_the_square(parsed):
    points = parsed.data["planes"][0]["points"]
    paths = [problem["chains"][0]["path"] for problem in parsed.data["problems"]]
    assert sum(map(len, paths)) == len(points)
    largest = max(abs(value) for x, y, *_ in points for value in (x, y))
    assert largest == pytest.approx(1, abs=2e-3)


class TestRunsWithoutDecoder:
    """A run whose thoughts are hidden states or projections of them, or that has none."""

    # {kind: switches of ATP}. The last three have no thoughts
    KINDS = {
        "no head": {},
        "a stop head": {"stop": True},
        "a projection": {"project": True},
        "words alone": {},
        "fillers": {"fillers": 2},
        "nothing": {"fillers": 0},
    }
    WITHOUT_THOUGHTS = ("words alone", "fillers", "nothing")

    @pytest.fixture(params=KINDS)
    def kind(self, request):
        return request.param

    @pytest.fixture
    def plain(self, kind, folder, tmp_path):
        switches = {"vae": False, "decode": False, "stop": False, **self.KINDS[kind]}
        model, tokenizer = load_model(folder, **switches)
        model.stage = 0 if kind == "words alone" else 3
        save_model(tmp_path / "run", model, tokenizer)
        return tmp_path / "run"

    def test_it_has_a_page(self, plain, kind, tmp_path):
        options = ["--problems", 6, "--max-new", 4, "--n", 2]
        run(sample.main, "--run", plain, "--html", tmp_path / "t.html", *options)
        data = Parsed((tmp_path / "t.html").read_text()).data
        shown = [problem["chains"][0] for problem in data["problems"]]
        thoughts = [row for chain in shown for row in chain["rows"] if "thought" in row]
        if kind in self.WITHOUT_THOUGHTS:
            assert not thoughts
            assert not data["planes"]
            return
        assert thoughts
        assert data["planes"][0]["points"]

        # no words, but the three that the policy would write at a hidden state
        n_word = 0 if kind == "a projection" else 3
        for row in thoughts:
            assert (row["text"], row["p"], len(row["or"])) == ("", None, n_word)

    def test_it_is_shown_in_the_terminal(self, plain, capsys):
        run(sample.main, "--run", plain, "--problems", 3, "--max-new", 4)
        assert " of 3 right" in capsys.readouterr().out

    def test_it_has_no_prior_to_draw_a_thought_from(self, plain, kind, capsys):
        edit = ["--edit", "replace 1 prior", "--problems", 6, "--max-new", 4]
        run(sample.main, "--run", plain, *edit, expect=2)
        reason = "no thoughts to edit" if kind in self.WITHOUT_THOUGHTS else "no prior"
        assert reason in capsys.readouterr().err

    def test_it_is_probed_if_it_has_latents(self, plain, kind, capsys):
        options = ["--problems", 12, "--max-new", 4, "--json"]
        if kind in self.WITHOUT_THOUGHTS:
            run(probe.main, plain, *options, expect=2)
            assert "thinks in words" in capsys.readouterr().err
            return
        run(probe.main, plain, *options)
        out = capsys.readouterr().out
        assert "prior" not in out
        assert json.loads(out)["using"][0]["latents"] > 0


# ---- one chain -----------------------------------------------------------------------------------


def chain_of(thoughts, text, stop_prob, sigma, n_token):
    """A Chain of two thoughts, each of two latents."""
    return Chain(
        thoughts=thoughts,
        text=text,
        ended=True,
        n_latent=4,
        n_token=n_token,
        stop_prob=stop_prob,
        sigma=sigma,
        z=torch.zeros(4, 8),
    )


def test_every_thought_keeps_its_own_numbers():
    """Also an empty thought and one of several lines. The stop comes between thoughts and words."""
    thoughts = ["", "<<1+1=2>>\nmore"]
    chain = chain_of(thoughts, "<<2+1=3>>\n### 3", [0.1, 0.2, 0.9], [0.01, 0.02], n_token=9)
    lines = show.draw(Problem("q", [], "3"), chain, 2, show.Paint(False))
    empty, second, rest, stop, written, answer = lines
    assert "stop 0.100  σ 0.010" in empty
    assert "<<1+1=2>>" in second and "used    stop 0.200  σ 0.020" in second
    assert "more" in rest and "stop" not in rest
    assert stop.startswith("  ■") and "0.900" in stop
    assert written.startswith("  · <<2+1=3>>") and "used" in written
    assert answer == "  → 3  ✓"


def test_links_join_a_result_to_its_use():
    thoughts = ["<<2+3=5>>", "<<1+1=2>>\n<<5*2=10>>"]
    chain = chain_of(thoughts, "<<10-9=1>>\n### 10", [0.1, 0.2], [0.3, 0.4], n_token=3)
    readings = [[("<<2+3=5>>", 0.8), ("<<2+3=6>>", 0.1)], []]
    column = show.Column("r", "", 2, [[chain]], seconds=1.0, n_position=3, readings=[readings])
    shown = page.chain_data(column, 0, Problem("?", [], "10"))

    rows = shown["rows"]
    assert [(row["text"], row.get("sigma"), row.get("stop")) for row in rows] == [
        ("<<2+3=5>>", 0.3, 0.1),
        ("<<1+1=2>>", 0.4, 0.2),
        ("<<5*2=10>>", None, None),
        ("<<10-9=1>>", None, None),
    ]
    assert shown["links"] == [[0, 2], [1, 2], [2, 3], [2, 4]]  # row 4: the answer
    assert shown["right"]
    assert (rows[0]["p"], rows[0]["or"]) == (0.8, [["<<2+3=6>>", 0.1]])


@pytest.mark.parametrize(
    "step, operation, result",
    [
        ("<<2+3=5>>", "+", 5),
        ("<<6/2=3>>", "/", 3),
        ("so 4×2.5=10", "*", 10),
        ("none", "", None),
        ("=7", "", 7),
    ],
)
def test_points_are_coloured_by_operation_and_result(step, operation, result):
    assert page.operation_and_result(step) == (operation, result)


# ---- the latents ---------------------------------------------------------------------------------


def test_the_plane_is_pca():
    """40 chains of one thought of two latents, compared with the eigenvectors of the covariance."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(40, 2, 8, generator=g) * torch.tensor([5.0, 1, 1, 3, 1, 1, 1, 1])
    z[:, 1] *= 0.1
    chains = [Chain([], "", True, 2, 0, [], [], latents) for latents in z]
    plane = page.Plane.fit(chains, 2)

    x = z.reshape(40, 16)
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    shares = [float(value / values.sum()) for value in values.flip(0)[:2]]
    assert plane.share == pytest.approx(shares, rel=1e-4)

    actual = torch.tensor([plane.path(chain, 2)[0] for chain in chains])
    expected = centred @ vectors[:, [-1, -2]]
    correlation = (actual * expected).sum(0) / actual.norm(dim=0) / expected.norm(dim=0)
    assert correlation.abs().min() > 0.999
    assert page.Plane.fit(chains[:2], 2) is None


@torch.no_grad()
def test_readings_are_the_likeliest(solved):
    """Readings have the probability that φ gives them, and differ.

    None is likelier than the first, not even the greedy one.
    """
    phi, eos = solved.model.decoder, solved.tokenizer.eos[0]
    z = torch.cat([chain.z for chain in solved.mean]).unflatten(0, (-1, 2))

    def probability(thought, ids):
        text = torch.tensor([[*ids, eos]])
        target_at = (text >= 0).nonzero(as_tuple=True)
        return float((-thought_nll(phi, thought[None], text, target_at)).exp())

    readings = page.top_readings(phi, z, eos, n=3, max_new=6)
    for thought, likeliest in zip(z, readings):
        p = [p for _, p in likeliest]
        assert p == sorted(p, reverse=True)
        assert len({tuple(ids) for ids, _ in likeliest}) == len(likeliest)
        for ids, p in likeliest:
            assert p == pytest.approx(probability(thought, ids), rel=1e-3, abs=1e-9)
    assert sum(map(len, readings)) > len(z)

    greedy = read_thoughts(phi, z, eos, 6)
    for thought, ids, likeliest in zip(z, greedy, readings):
        if len(ids) < 6:  # ended
            assert likeliest[0][1] >= probability(thought, ids) * (1 - 1e-4)
