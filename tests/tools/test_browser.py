"""The page in headless Chromium: three widths, light and dark, by keyboard. Not in the fast suite:

    MINATP_BROWSER=1 python -m pytest -q tests/tools/test_browser.py

Uses the chromium that is installed, or installs Debian's with apt-get; skipped if neither works.
MINATP_SHOTS=DIR keeps screenshots.
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

from minatp.decoder import Chain
from minatp.problems import Problem
from minatp.tools import page
from minatp.tools.show import Column

pytestmark = pytest.mark.skipif(
    not os.environ.get("MINATP_BROWSER"), reason="a browser test; set MINATP_BROWSER=1 to run it"
)

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]


class Browser:
    """Chromium, driven through its debugging pipe: JSON messages that end in a zero byte."""

    def __init__(self, program, profile):
        # Chromium reads commands from descriptor 3 and writes replies to 4
        command_in, self.command_out = os.pipe()
        self.reply_in, reply_out = os.pipe()
        options = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        redirect = f'exec "$0" "$@" 3<&{command_in} 4>&{reply_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirect, program, *options],
            pass_fds=(command_in, reply_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(command_in)
        os.close(reply_out)

        self.n_sent = 0
        self.buffer = b""  # what has been read of the next message
        self.events = []  # messages that answer no command
        self.session = None
        targets = self.send("Target.getTargets")["targetInfos"]
        tab = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(domain + ".enable")

    def send(self, method, **params):
        """Send a command and return its result. Events that come before it are kept."""
        self.n_sent += 1
        message = {"id": self.n_sent, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.command_out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self.receive()
            if reply.get("id") == self.n_sent:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append(reply)

    def receive(self):
        """The next message."""
        while b"\0" not in self.buffer:
            piece = os.read(self.reply_in, 1 << 20)
            assert piece, "chromium has ended"
            self.buffer += piece
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def run(self, script):
        """The value of a JavaScript expression in the page."""
        reply = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def count(self, selector):
        """How many elements of the page match a selector."""
        return self.run(f"document.querySelectorAll({selector!r}).length")

    def text(self, selector):
        return self.run(f"document.querySelector({selector!r}).textContent")

    def resize(self, width, height, dark):
        """Set the size of the window, and the theme that the system prefers."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[theme])

    def open(self, url, width=1280, height=900, dark=False):
        """Load a page; returns the seconds until it is drawn."""
        self.resize(width, height, dark)
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        for _ in range(300):
            if self.run("document.readyState === 'complete' && location.protocol === 'file:'"):
                break
            time.sleep(0.05)
        drawn = "new Promise(done => requestAnimationFrame(() => done(performance.now() / 1000)))"
        return self.run(drawn)

    def press(self, key):
        text = key if len(key) == 1 else ""
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, text="")

    def screenshot(self, name):
        """Keep a picture of the window, if MINATP_SHOTS names a folder."""
        if os.environ.get("MINATP_SHOTS"):
            folder = Path(os.environ["MINATP_SHOTS"])
            folder.mkdir(parents=True, exist_ok=True)
            picture = base64.b64decode(self.send("Page.captureScreenshot")["data"])
            (folder / f"{name}.png").write_bytes(picture)

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.command_out)
        os.close(self.reply_in)


def find_chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if not program and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
        subprocess.run(install, capture_output=True)
        program = find_chromium()
    if not program:
        pytest.skip("chromium is not installed, and apt-get cannot install it")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


# ---- the page under test -------------------------------------------------------------------------

QUESTION = "Ann has {} pens and finds {}; then they are {} times as many. How many has she?"
HOSTILE = "<img src=http://nowhere.invalid/x onerror='window.hit = 1'>"


def make_chain(numbers, right, generator):
    """A chain of two thoughts: a sum, and a product that uses it."""
    a, b, c = numbers
    product = (a + b) * c
    answer = product if right else product + 1
    return Chain(
        thoughts=[f"<<{a}+{b}={a + b}>>", f"<<{a + b}*{c}={product}>>"],
        text=f"### {answer}",
        ended=True,
        n_latent=4,
        n_token=3,
        stop_prob=[0.01, 0.2, 0.9],
        sigma=[0.1, 0.2],
        z=torch.randn(4, 8, generator=generator),
    )


def make_column(run, all_numbers, always_right, generator):
    """A run's column, with two sampled chains a problem. Not always right: only in odd problems."""
    chains = []
    for i, numbers in enumerate(all_numbers):
        chains.append(make_chain(numbers, always_right or i % 2 == 1, generator))
    sampled = [
        [make_chain(numbers, right, generator) for right in (True, False)]
        for numbers in all_numbers
    ]
    readings = [
        [[(thought, 0.8), ("<<1+1=2>>", 0.1)] for thought in chain.thoughts] for chain in chains
    ]
    return Column(
        run=run,
        edit="",
        c=2,
        chains=[[chain] for chain in chains],
        seconds=1.0,
        n_position=1,
        sampled=sampled,
        readings=readings,
        plane=page.Plane.fit(chains, 2),
    )


def drop_column(column):
    """A column of an edit, which does not apply to the first problem."""
    return Column(
        run=column.run,
        edit="drop 1",
        c=2,
        chains=[[], *column.chains[1:]],
        seconds=1.0,
        n_position=1,
        readings=[[], *column.readings[1:]],
        plane=column.plane,
    )


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A page of 50 problems and three columns, its chains written by hand. The fifth is hostile."""
    generator = torch.Generator().manual_seed(0)
    all_numbers = torch.randint(2, 9, (50, 3), generator=generator).tolist()
    problems = []
    for a, b, c in all_numbers:
        problems.append(Problem(QUESTION.format(a, b, c), [], str((a + b) * c)))
    problems[4].question = "Long " + "word " * 80 + HOSTILE + "x" * 200

    sft = make_column("sft", all_numbers, False, generator)
    rl = make_column("rl", all_numbers, True, generator)
    path = tmp_path_factory.mktemp("page") / "thoughts.html"
    page.write(path, [sft, rl, drop_column(rl)], problems)
    return path.as_uri()


# ---- tests ---------------------------------------------------------------------------------------

# For each arc of each chain: whether it begins and ends at the height of the rows that it joins
ARCS_MEET_ROWS = """
[...document.querySelectorAll('.chain')].flatMap(chain =>
  [...chain.querySelectorAll('[data-link]')].map(arc => {
    const box = arc.getBoundingClientRect()
    const [source, user] = arc.dataset.link.split('-').map(r =>
      chain.querySelector(`[data-r="${r}"]`).getBoundingClientRect())
    return box.top > source.top && box.top < source.bottom
      && box.bottom > user.top && box.bottom < user.bottom
  }))
"""

# Mean of the red, green and blue of the background
BRIGHTNESS = """
getComputedStyle(document.body).backgroundColor
  .match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3
"""

ALL_BUTTONS_HAVE_NAMES = """
[...document.querySelectorAll('button')]
  .every(button => (button.getAttribute('aria-label') || button.textContent).trim())
"""


def requested_urls(events):
    requests = [e["params"] for e in events if e.get("method") == "Network.requestWillBeSent"]
    return {params["request"]["url"].partition("#")[0] for params in requests}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width, height", [(375, 800), (768, 1000), (1280, 900)])
def test_it_fits_and_draws(browser, url, width, height, dark):
    browser.events.clear()
    seconds = browser.open(url + "#2", width, height, dark)
    browser.screenshot(f"{width}-{'dark' if dark else 'light'}")
    assert seconds < 2, "50 problems must open at once"
    assert browser.count("nav button") == 50
    assert browser.count(".view") == 3

    # Nothing is wider than the window, not even words of 200 letters
    for problem in (2, 5):
        browser.run(f"show({problem - 1})")
        assert browser.run("document.documentElement.scrollWidth") <= width

    browser.run("show(1)")
    brightness = browser.run(BRIGHTNESS)
    assert brightness < 60 if dark else brightness > 200

    # In each of three columns, from the sum to the product and from that to the answer
    assert browser.run(ARCS_MEET_ROWS) == [True] * 6

    # No error, no request but for the file itself, and no text was run
    failures = ("Log.entryAdded", "Runtime.exceptionThrown")
    assert not [event for event in browser.events if event.get("method") in failures]
    assert requested_urls(browser.events) - {"about:blank"} == {url}
    assert browser.run("window.hit") is None


def shown_problem(browser):
    """The number of the problem that the page shows."""
    return browser.run("document.querySelector('.where').textContent.match(/\\d+/)[0]")


def test_keys_move_between_problems(browser, url):
    browser.open(url)
    shown = [shown_problem(browser)]
    for key in ("j", "ArrowRight", "k", "ArrowLeft", "k"):
        browser.press(key)
        shown.append(shown_problem(browser))
    assert shown == ["1", "2", "3", "2", "1", "1"]
    assert browser.run("location.hash") == "#1"


def test_keys_filter_colour_and_help(browser, url):
    browser.open(url)
    browser.press("f")
    assert browser.count("nav button") == 25
    assert browser.text("#filter") == "Wrong · 25"
    browser.press("j")
    assert shown_problem(browser) == "3"  # the next wrong one
    browser.press("c")
    assert "result" in browser.text("#colour")
    assert browser.count(".ramp") == 3
    browser.press("t")
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    browser.press("?")
    assert browser.run("document.querySelector('dialog').open") is True
    browser.press("j")
    assert shown_problem(browser) == "3"  # keys do nothing while the help is open


def test_a_point_opens_its_problem(browser, url):
    browser.open(url)
    browser.run(
        "document.querySelector('.plane').querySelectorAll('circle.pt')[20]"
        ".dispatchEvent(new MouseEvent('click'))"
    )
    assert browser.run("location.hash") == "#11"  # two thoughts a problem


def test_every_button_has_a_name(browser, url):
    browser.open(url)
    assert browser.run(ALL_BUTTONS_HAVE_NAMES)


def test_an_edit_that_does_not_apply_is_said(browser, url):
    browser.open(url)
    browser.run("show(10)")
    assert browser.count(".na") == 0
    browser.run("show(0)")
    assert browser.count(".na") == 1
