"""What the README says of the code is true."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_points_at_the_lines_it_names():
    rows = re.findall(r"\| `([^`]+)` \| \[[^]]+\]\(([^)#]+)#L(\d+)\) \|", README)
    assert len(rows) >= 15
    for code, path, line in rows:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        assert code in lines[int(line) - 1], f"{path}:{line} is not {code!r}; it is on line {[i for i, x in enumerate(lines, 1) if code in x]}"


def test_every_file_named_exists():
    for path in re.findall(r"\]\((?!http)(\w[^)#]*)", README):
        assert (ROOT / path).exists(), path


def test_the_kernel_shown_is_the_kernel():
    code = re.search(r"```python\n(@triton.jit.*?)```", README, re.DOTALL)[1]
    assert code in (ROOT / "kernels/rows.py").read_text(encoding="utf-8")
