"""What the README and the pages under docs/ say of the code is true."""

import re
from pathlib import Path

import pytest

from minatp.tools import ablate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read(path):
    return path.read_text(encoding="utf-8")


def anchors(page):
    """The anchors of a Markdown page: its headings as GitHub spells them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", read(page), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.replace(" ", "-"))
    return found


def test_the_map_names_code_that_stands_in_the_file():
    """docs/method.md: | equation | `code` | [file](path) |"""
    rows = re.findall(
        r"\| `([^`]+)` \| \[[^]]+\]\(([^)]+)\) \|$", read(ROOT / "docs/method.md"), re.M
    )
    assert len(rows) >= 15
    for code, path in rows:
        assert code in read(ROOT / "docs" / path), f"{path} does not hold {code!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    prose = re.sub(r"`[^`\n]*`", "", read(page))  # code can look like a link
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_names_a_program_that_exists(page):
    for module in re.findall(r"python3? -m ((?:minatp|kernels)[\w.]*)", read(page)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for script in re.findall(r"python3? ([\w/]+\.py)", read(page)):
        assert (ROOT / script).exists(), script
    for test in re.findall(r"pytest [^`\n#]*?(tests[\w/.]*)", read(page)):
        assert (ROOT / test).exists(), test


def test_the_arms_that_are_named_exist():
    texts = [ablate.__doc__, *map(read, PAGES)]
    named = [arms for text in texts for arms in re.findall(r'--arms "([^"]+)"', text)]
    assert named
    for arms in named:
        for arm in arms.split(";"):
            assert arm.strip() in {*ablate.METHODS, *ablate.arms_after()}


def test_the_kernel_shown_is_the_kernel():
    code = re.search(
        r"```python\n(@triton.jit.*?)```", read(ROOT / "kernels/README.md"), re.DOTALL
    )[1]
    assert code in read(ROOT / "kernels/rows.py")


def test_the_readme_stays_short():
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500


def test_the_tree_names_every_file_of_the_method():
    tree = re.search(r"```\ntrain.py.*?```", read(ROOT / "README.md"), re.DOTALL)[0]
    entry_files = {"__init__", "evaluate", "probe", "plot", "ablate"}
    for path in (ROOT / "minatp").glob("*.py"):
        if path.stem not in entry_files:
            assert re.search(rf"\b{path.stem}\b", tree), path.stem
