"""The page in headless Chromium, at two widths, light and dark, by keyboard. Not in the fast suite:

    MINATP_BROWSER=1 python -m pytest -q tests/test_browser.py

Uses the chromium that is there, or installs Debian's by apt-get; skipped where neither works. MINATP_SHOTS=DIR keeps pictures.
"""
import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from minatp import page
from minatp.data import Problem
from minatp.evaluate import Chain

pytestmark = pytest.mark.skipif(not os.environ.get("MINATP_BROWSER"), reason="a browser test; set MINATP_BROWSER=1 to run it")


class Browser:
    """Chromium by its debugging pipe: JSON messages that end in a zero byte."""
    def __init__(self, program, profile):
        (theirs_in, self.to), (self.back, theirs_out) = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', program, *options],
                                        pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in), os.close(theirs_out)
        self.count, self.buffer, self.session, self.events = 0, b"", None, []
        target = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(domain + ".enable")

    def ask(self, method, **how):
        self.count += 1
        message = {"id": self.count, "method": method, "params": how} | ({"sessionId": self.session} if self.session else {})
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                piece = os.read(self.back, 1 << 20)
                assert piece, "chromium has ended"
                self.buffer += piece
            text, self.buffer = self.buffer.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, script):
        """The value of an expression in the page."""
        got = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def count_of(self, selector):
        return self.run(f"document.querySelectorAll({selector!r}).length")

    def open(self, url, width=1280, height=900, dark=False):
        """Load a page; returns seconds until it is drawn."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=url)
        for _ in range(300):
            if self.run("document.readyState === 'complete' && location.protocol === 'file:'"):
                break
            time.sleep(0.05)
        return self.run("new Promise(done => requestAnimationFrame(() => done((performance.now()) / 1000)))")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, text=key if kind == "keyDown" and len(key) == 1 else "")

    def shot(self, name):
        if os.environ.get("MINATP_SHOTS"):
            folder = Path(os.environ["MINATP_SHOTS"])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.png").write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to), os.close(self.back)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program and shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"], capture_output=True)
        program = shutil.which("chromium")
    if not program:
        pytest.skip("no chromium here, and apt-get cannot install it: apt-get install chromium")
    b = Browser(program, tmp_path_factory.mktemp("profile"))
    yield b
    b.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A page of 50 problems and three columns, its chains written by hand."""
    g = torch.Generator().manual_seed(0)

    def chain(a, b, c, right=True):
        steps = [f"<<{a}+{b}={a + b}>>", f"<<{a + b}*{c}={(a + b) * c}>>"]
        answer = (a + b) * c + (not right)
        return Chain(steps, f"### {answer}", True, 4, 3, [0.01, 0.2, 0.9], [0.1, 0.2], torch.randn(4, 8, generator=g))

    numbers = torch.randint(2, 9, (50, 3), generator=g).tolist()
    told = "Ann has {} pens and finds {}; then they are {} times as many. How many has she?"
    ps = [Problem(told.format(a, b, c), [], str((a + b) * c)) for a, b, c in numbers]
    ps[4] = Problem("Long " + "word " * 80 + "<img src=http://nowhere.invalid/x onerror='window.hit = 1'>" + "x" * 200, [], ps[4].answer)
    views = []
    for run, right in (("sft", lambda i: i % 2), ("rl", lambda i: True)):
        chains = [chain(*n, right(i)) for i, n in enumerate(numbers)]
        told = [[[(t, 0.8), ("<<1+1=2>>", 0.1)] for t in c.thoughts] for c in chains]
        views.append(page.View(run, "", chains, [[chain(*n), chain(*n, False)] for n in numbers], told, 2, page.Plane.fit(chains, 2)))
    views.append(page.View("rl · drop 1", "drop 1", [None] + views[1].chains[1:], [], [[]] + views[1].readings[1:], 2, views[1].plane))
    path = tmp_path_factory.mktemp("page") / "thoughts.html"
    page.write(path, views, ps)
    return path.as_uri()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width, height", [(375, 800), (768, 1000), (1280, 900)])
def test_it_fits_and_draws(browser, url, width, height, dark):
    browser.events.clear()
    seconds = browser.open(url + "#2", width, height, dark)
    browser.shot(f"{width}-{'dark' if dark else 'light'}")
    assert seconds < 2, "50 problems must open at once"
    assert (browser.count_of("nav button"), browser.count_of(".view")) == (50, 3)
    for i in (2, 5):  # the fifth has words of 200 letters
        browser.run(f"show({i - 1})")
        assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("show(1)")
    light = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3")
    assert light < 60 if dark else light > 200
    # arcs begin and end at the height of their rows
    gaps = browser.run("""[...document.querySelectorAll('.chain')].flatMap(chain => [...chain.querySelectorAll('[data-link]')].map(arc => {
        const box = arc.getBoundingClientRect()
        const [a, b] = arc.dataset.link.split('-').map(r => chain.querySelector(`[data-r="${r}"]`).getBoundingClientRect())
        return box.top > a.top && box.top < a.bottom && box.bottom > b.top && box.bottom < b.bottom }))""")
    assert gaps == [True] * 6  # in each of three columns from the sum to the product, and from that to the answer
    assert not [e for e in browser.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
    asked = {e["params"]["request"]["url"].partition("#")[0] for e in browser.events if e.get("method") == "Network.requestWillBeSent"}
    assert asked == {url, "about:blank"} or asked == {url}
    assert browser.run("window.hit") is None


def test_keys(browser, url):
    browser.open(url)
    at = lambda: browser.run("document.querySelector('.where').textContent.match(/\\d+/)[0]")
    seen = [at()]
    for key in ("j", "ArrowRight", "k", "ArrowLeft", "k"):
        browser.key(key)
        seen.append(at())
    assert seen == ["1", "2", "3", "2", "1", "1"] and browser.run("location.hash") == "#1"
    browser.key("f")
    assert browser.count_of("nav button") == 25 and browser.run("document.querySelector('#filter').textContent") == "Wrong · 25"
    browser.key("j")
    assert at() == "3"  # the next wrong one
    browser.key("c")
    assert "result" in browser.run("document.querySelector('#colour').textContent") and browser.count_of(".ramp") == 3
    browser.key("t")
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    browser.key("?")
    assert browser.run("document.querySelector('dialog').open") is True
    browser.key("j")
    assert at() == "3"  # the keys rest while the help is open


def test_a_point_opens_its_problem_and_every_button_has_a_name(browser, url):
    browser.open(url)
    browser.run("document.querySelectorAll('.plane')[0].querySelectorAll('circle.pt')[20].dispatchEvent(new MouseEvent('click'))")
    assert browser.run("location.hash") == "#11"  # two thoughts a problem
    assert browser.run("[...document.querySelectorAll('button')].every(b => (b.getAttribute('aria-label') || b.textContent).trim())")
    assert browser.count_of(".na") == 0
    browser.run("show(0)")
    assert browser.count_of(".na") == 1  # the edit that does not apply
