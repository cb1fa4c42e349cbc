"""The layout of the project: who may import whom, and what importing the package costs."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import triton_sparse_rnn
from triton_sparse_rnn import errors

PROJECT = Path(triton_sparse_rnn.__file__).resolve().parent.parent
PACKAGE = "triton_sparse_rnn"
# A file imports from its own folder and from the folders and files below its own line here.
ORDER = [
    {"__init__", "cli"},
    {"demo"},
    {"doctor", "export", "report", "integrations"},
    {"checkpoint_files", "recurrent_tensors", "report_values"},
    {"conversion", "pruning", "saving"},
    {"nn"},
    {"gate_gradients"},
    {"ops"},
    {"kernels"},
    {"sparse"},
    {"atomic_files", "errors", "names", "notices", "tables"},
]
NOT_INSTALLED = {"bench", "examples", "studies", "tests", "tools"}
# Names that two files or more define, because what they name is the same. Any other public name means one thing.
TWINS = {
    "PrunerCallback": "of each trainer",
    "LinearLayer": "as RecurrentLayer",
    "RecurrentLayer": "a layer ready to run, of each backend's kernels",
    "availability": "of each backend",
    "direction_gradients": "of each backend",
    "gru_cell": "the cell of ops/backends/reference.py's equations, in each kernel language",
    "hash32": "the random numbers of gate_gradients/random.py, in each kernel language",
    "load_step": "what a step of backward reads, in each kernel language",
    "lstm_cell": "as gru_cell",
    "lstm_cells": "the cells that backward needs again, in torch and in a CPU kernel",
    "prepare_layer": "of each backend",
    "prepare_linear": "of each backend",
    "recurrent_layer": "the operator, and its reference in plain torch",
    "tanh": "as gru_cell",
    "uniform": "as hash32",
    "unsupported_linear_reason": "of each backend",
    "unsupported_reason": "of each backend, and of the one that is asked for",
}
RANK = {name: len(ORDER) - line for line, names in enumerate(ORDER) for name in names}


def source_files():
    package = [path for path in (PROJECT / PACKAGE).rglob("*.py") if "kernels" not in path.parts[:-1]]
    kernels = [*(PROJECT / "kernels").rglob("*.py")]
    return sorted({*package, *kernels})


def imported_modules(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if node.module != PACKAGE:
                yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path: Path) -> str:
    """The name under which a source file is imported."""
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts if parts[0] == PACKAGE else (PACKAGE, *parts)).removesuffix(".__init__")


def part_of(path: Path) -> str:
    """The folder or file of the package that a source file belongs to."""
    relative = path.relative_to(PROJECT)
    return "kernels" if relative.parts[0] == "kernels" else Path(relative.parts[1]).stem


def import_faults(part: str, tree: ast.AST) -> list[str]:
    faults = []
    for module in imported_modules(tree):
        top, _, rest = module.partition(".")
        if top == "kernels":
            faults.append("kernels is imported only as triton_sparse_rnn.kernels")
        elif top in NOT_INSTALLED:
            faults.append(f"{top} is not installed with the package")
        elif top == PACKAGE:
            target = rest.partition(".")[0] or "__init__"
            if target != part and RANK.get(target, len(ORDER)) >= RANK[part]:
                faults.append(f"{part} must not import {target}")
    return faults


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_imports_point_one_way(path):
    assert import_faults(part_of(path), ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("sparse", "from triton_sparse_rnn.nn import SparseGRU"),
        ("kernels", "import triton_sparse_rnn.ops.dispatch"),
        ("ops", "import kernels.cpu"),
        ("nn", "from kernels import cpu"),
        ("nn", "from triton_sparse_rnn import to_sparse"),
        ("kernels", "from tools.machine_code import compile_for"),
    ],
)
def test_a_wrong_import_is_found(part, line):
    assert import_faults(part, ast.parse(line))


@pytest.mark.parametrize("path", [*(PROJECT / PACKAGE / "pruning").glob("*.py")], ids=lambda path: path.name)
def test_pruning_asks_its_pattern_and_knows_no_blocks(path):
    text = path.read_text(encoding="utf-8")
    assert "sparse.blocks" not in text
    assert "block_size" not in text
    assert "Blocks(" not in re.sub(r'""".*?"""', "", text, flags=re.DOTALL)  # examples have some


@pytest.mark.parametrize("folder", ["bench", "examples", "kernels", "studies", "tools"])
def test_the_demo_is_no_library(folder):
    """What is measured stays as it is when the demo changes."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (PROJECT / folder).rglob("*.py")]
    assert trees
    assert [name for tree in trees for name in imported_modules(tree) if name.startswith(f"{PACKAGE}.demo")] == []


def check_no_circle(sources: dict[str, str]) -> None:
    """Raise CycleError where modules import each other in a circle, in functions and for type checkers too."""
    graph = {name: sources.keys() & {*imported_modules(ast.parse(text))} for name, text in sources.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_files_import_each_other_in_a_circle():
    check_no_circle({module_of(path): path.read_text(encoding="utf-8") for path in source_files()})


@pytest.mark.parametrize("back", ["from p import a", "def f():\n    import p.a", "if X:\n    from p.a import x"])
def test_a_circle_is_found(back):
    with pytest.raises(graphlib.CycleError):
        check_no_circle({"p.a": "import p.b", "p.b": "import p.c", "p.c": back})


def test_a_public_name_means_one_thing():
    files: dict[str, set[Path]] = {}
    for path in source_files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                files.setdefault(node.name, set()).add(path)
    assert sorted(name for name, where in files.items() if len(where) > 1) == sorted(TWINS)


def test_kernels_is_one_folder_under_two_paths():
    link = PROJECT / PACKAGE / "kernels"
    assert link.is_symlink()
    assert link.resolve() == PROJECT / "kernels"


def test_public_names():
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert raised <= {*triton_sparse_rnn.__all__}  # whoever calls must be able to catch them
    assert sorted(triton_sparse_rnn.__all__) == triton_sparse_rnn.__all__
    for name in triton_sparse_rnn.__all__:
        assert getattr(triton_sparse_rnn, name).__doc__, name


def test_importing_the_package_loads_no_compiler_and_no_extra():
    heavy = ["numba", "triton", "rich", "matplotlib", "kernels"]
    code = f"import sys, triton_sparse_rnn; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
