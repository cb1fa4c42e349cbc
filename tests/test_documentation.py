"""The README and the pages of docs/: their Python runs, and the commands, files and headings that they name exist."""

import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from triton_sparse_rnn import cli

PROJECT = Path(__file__).resolve().parent.parent
GUIDES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
PAGES = [
    *GUIDES,
    *(PROJECT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(PROJECT.glob("*/README.md")),
    *sorted(PROJECT.glob("bench/*/*.md")),
    *PROJECT.glob("studies/results/*.md"),
]
# A page whose code needs what the extra `test` does not install is skipped without it.
NEEDS = {"docs/trainers.md": ["lightning", "transformers", "accelerate", "darts.models", "pytorch_forecasting"]}
FOLDERS = ("bench", "docs", "examples", "kernels", "studies", "tests", "tools", "triton_sparse_rnn")

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`]+)`")
_INDENTED = re.compile(r"^ {4}(\S.*)$", flags=re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
_HEADING = re.compile(r"^#+ +(.*)$", flags=re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(PROJECT).as_posix()


def python_of(text: str) -> str:
    """The Python blocks of a page as one script, each line where the page has it."""
    lines = [""] * text.count("\n")
    for block in _BLOCK.finditer(text):
        if block[1] == "python":
            first = text.count("\n", 0, block.start(2))
            code = block[2].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines)


def without_blocks(text: str) -> str:
    return _BLOCK.sub("", text)


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of every command in a shell block, a block of indented lines, or a code span."""
    lines = [line for block in _BLOCK.finditer(text) if block[1] in ("sh", "") for line in block[2].splitlines()]
    rest = without_blocks(text)
    spans = [" ".join(span.split()) for span in _SPAN.findall(rest)]
    for line in (*lines, *_INDENTED.findall(rest), *spans):
        for command in re.split(r"&&|;|\|", line):
            with contextlib.suppress(ValueError):  # unbalanced quotes: it is no command
                if words := shlex.split(command, comments=True):
                    yield words


def command_faults(words: list[str]) -> list[str]:
    """What a command names that is not there; commands of others than this project are not looked at."""
    if words[:2] == ["python", "-m"] and len(words) > 2:
        faults = module_faults(words[2], words[3:])
    elif words[0] == "triton-sparse-rnn":
        faults = help_faults(words[1:], cli.main)
    elif words[0] in ("bash", "python") and len(words) > 1:
        script = PROJECT / words[1]
        faults = [] if script.is_file() else [f"no file {words[1]}"]
        if not faults:
            text = script.read_text(encoding="utf-8")
            faults = [f"{words[1]} does not know {word}" for word in words[2:] if word[:2] == "--" and word not in text]
    else:
        faults = []
    return faults + [f"no file {word}" for word in words if is_path(word) and not list(PROJECT.glob(word))]


def is_path(word: str) -> bool:
    folder, separator, rest = word.partition("/")
    return bool(separator and rest and folder in FOLDERS and re.fullmatch(r"[\w./*-]+", rest))


def module_faults(name: str, arguments: list[str]) -> list[str]:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return [f"no module {name}"]
    program = Path(spec.origin)
    program = program.with_name("__main__.py") if program.name == "__init__.py" else program
    source = program.read_text(encoding="utf-8") if program.is_file() else ""
    if "__main__" not in source:
        return [f"{name} is no program"]
    if not re.search("argparse|command_line", source):
        return [f"{name} takes no {word}" for word in arguments if word.startswith("--")]

    def run(argv: list[str]) -> object:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*found in sys.modules")  # imported by another test
            patch.setattr(sys, "argv", [name, *argv])
            return runpy.run_module(name, run_name="__main__", alter_sys=True)

    return help_faults(arguments, run)


def help_faults(arguments: list[str], run: Callable[[list[str]], object]) -> list[str]:
    """Ask for --help, of the subcommand if there is one, and look for the options that are used."""
    subcommand = arguments[:1] if arguments and re.fullmatch("[a-z][a-z-]*", arguments[0]) else []
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), pytest.raises(SystemExit) as end:
        run([*subcommand, "--help"])
    if end.value.code:
        return [f"--help fails: {shown.getvalue()}"]
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    return [f"no option {option}" for option in options if option not in shown.getvalue()]


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    anchors: set[str] = set()
    for heading in _HEADING.findall(without_blocks(text)):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        repeats = (f"{slug}-{number}" for number in range(1, 100))
        anchors.add(next(repeat for repeat in repeats if repeat not in anchors) if slug in anchors else slug)
    return anchors


def link_faults(page: Path, text: str) -> list[str]:
    faults = []
    for match in _LINK.finditer(_SPAN.sub("", without_blocks(text))):
        link = match[1] or match[2]
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            faults.append(f"no file {link}")
        elif anchor and anchor not in anchors_of(text if target == page else target.read_text(encoding="utf-8")):
            faults.append(f"no heading {link}")
    return faults


@pytest.fixture
def in_project(monkeypatch):
    """The benchmarks are not installed: `python -m bench.report` finds them from the root of the project."""
    monkeypatch.chdir(PROJECT)
    monkeypatch.syspath_prepend(str(PROJECT))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "page", [page for page in GUIDES if "```python" in page.read_text(encoding="utf-8")], ids=name_of
)
def test_python_runs(page, tmp_path, monkeypatch):
    for package in NEEDS.get(name_of(page), ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = python_of(page.read_text(encoding="utf-8"))
    exec(compile(code, str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_commands_exist(page, in_project):
    text = page.read_text(encoding="utf-8")
    faults = {shlex.join(words): command_faults(words) for words in commands_of(text)}
    assert {command: found for command, found in faults.items() if found} == {}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert link_faults(page, page.read_text(encoding="utf-8")) == []


def test_no_figure_is_missing():
    assert [name_of(page) for page in PAGES if "FIGURE" in page.read_text(encoding="utf-8")] == []


def test_every_page_and_drawing_is_linked_and_drawings_are_valid():
    linked = set()
    for page in PAGES:
        links = (match[1] or match[2] for match in _LINK.finditer(page.read_text(encoding="utf-8")))
        linked |= {(page.parent / link.partition("#")[0]).resolve() for link in links}
    drawings = sorted((PROJECT / "docs" / "drawings").iterdir())
    assert [name_of(path) for path in (*GUIDES[1:], *drawings) if path not in linked] == []
    for drawing in drawings:
        assert ElementTree.parse(drawing).getroot().get("viewBox"), drawing


@pytest.mark.parametrize(
    "command",
    [
        "python -m bench.no_such_module",
        "python -m bench.report --no-such-option FILE",
        "python -m studies.gate_gradients fly",
        "python -m bench.cpu.memory --fast",
        "python -m bench.rows",
        "pytest bench/bench_nothing.py",
        "triton-sparse-rnn fly",
        "triton-sparse-rnn demo --fly",
        "triton-sparse-rnn export-c --fly",
        "bash bench/gpu_check.sh --fly DIR",
        "bash bench/nothing.sh",
        "python examples/nothing.py --quick",
        "kernels/nothing.py",
    ],
)
def test_a_wrong_command_is_found(command, in_project):
    text = f"Run `{command}`, or\n\n```sh\npip install . && {command}  # a comment\n```\n"
    assert [words for words in commands_of(text) if command_faults(words)] == [command.split()] * 2


@pytest.mark.parametrize(
    "link", ["[a](docs/nothing.md)", "![a](nothing.png)", "[a](#no-heading)", "[a](CONTRIBUTING.md#no-heading)"]
)
def test_a_wrong_link_is_found(link):
    assert link_faults(PROJECT / "README.md", f"# A `heading`: (here)\n\n[good](#a-heading-here) {link}\n")


def test_a_script_keeps_the_lines_of_its_page():
    assert python_of("text\n```python\na = 1\n```\nmore\n```sh\nls\n```\n```python\nb = a\n```\n").splitlines() == [
        *("", "", "a = 1", "", "", "", "", "", "", "b = a"),
    ]
