"""The direction of imports: kernels <- the method <- what surrounds a run <- tools.

All is read from the source with `ast`; nothing is imported or run.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENTRY_FILES = {"evaluate", "probe", "plot", "ablate"}  # `python -m minatp.NAME`; three lines each


def modules_in(*patterns):
    """{"minatp.run.loop": path} of the files that match."""
    modules = {}
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            modules[".".join(parts)] = path
    return modules


MODULES = modules_in("*.py", "minatp/**/*.py", "kernels/**/*.py")
METHOD = [
    name
    for name in modules_in("minatp/*.py")
    if name != "minatp" and name.removeprefix("minatp.") not in ENTRY_FILES
]
KERNELS = list(modules_in("kernels/**/*.py"))
RUN = list(modules_in("minatp/run/**/*.py"))


def test_the_modules_are_found():
    assert {"minatp.llama", "minatp.rl", "minatp.sft"} <= set(METHOD)
    assert {"kernels", "kernels.ops"} <= set(KERNELS)
    assert {"minatp.run", "minatp.run.loop"} <= set(RUN)
    assert {"train", "sample", "minatp.tools.probe", "minatp.evaluate"} <= set(MODULES)


# ---- reading imports -----------------------------------------------------------------------------


def parse(module):
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def walk(tree, into_functions):
    """All nodes; without into_functions those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        yield node
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if into_functions or not is_function:
            yield from walk(node, into_functions)


def imports(module, into_functions=True):
    """The full names of what a module imports: of modules, and of what it takes out of them.

    `from ..run import loop` in minatp.tools.probe -> minatp.run, minatp.run.loop.
    """
    is_package = MODULES[module].name == "__init__.py"
    package = module if is_package else module.rpartition(".")[0]
    names = set()
    for node in walk(parse(module), into_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names.add(base)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def inside(name, *packages):
    """Whether a name is that of a package, or of something in it."""
    return any(name == package or name.startswith(package + ".") for package in packages)


# ---- the method ----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", METHOD)
def test_the_method_imports_nothing_that_surrounds_it(module):
    surroundings = ("minatp.run", "minatp.tools", "minatp.bench", "train", "sample")
    system = ("os", "sys", "pathlib", "torch.distributed")
    assert not [name for name in imports(module) if inside(name, *surroundings, *system)]


@pytest.mark.parametrize("module", METHOD)
def test_the_method_knows_no_file_no_terminal_and_no_rank(module):
    source = MODULES[module].read_text(encoding="utf-8")
    assert "UserError" not in source  # not even in words: it raises ValueError

    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Name):
            assert node.id not in ("print", "open", "input", "Path"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            place = f"line {node.lineno}"
            assert node.attr not in ("stdin", "stdout", "stderr", "distributed"), place


# ---- kernels, run --------------------------------------------------------------------------------


@pytest.mark.parametrize("module", KERNELS)
def test_the_kernels_import_nothing_of_minatp(module):
    assert not [name for name in imports(module) if inside(name, "minatp", "train", "sample")]


@pytest.mark.parametrize("module", RUN)
def test_a_run_imports_no_tool_and_no_benchmark(module):
    """train.py loads the dry run only if it is asked for one."""
    at_import = imports(module, into_functions=False)
    assert not [name for name in at_import if inside(name, "minatp.tools", "minatp.bench")]


# ---- no cycles -----------------------------------------------------------------------------------


def dependencies(module):
    """The modules of this repository that a module imports, except for its own packages."""
    names = imports(module, into_functions=False)
    return {name for name in names if name in MODULES and not inside(module, name)}


def test_no_imports_in_a_circle():
    graph = {module: dependencies(module) for module in MODULES}
    assert "minatp.llama" in graph["minatp.latent"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules
