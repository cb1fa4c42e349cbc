"""The command `triton-sparse-rnn`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import io
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 for a wrong result, 2 for a user's error, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows "?", and nothing fails
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; it imports nothing heavy, so that --help is quick."""
    parser = argparse.ArgumentParser(
        prog="triton-sparse-rnn",
        description="Recurrent networks that train while they are pruned and run from sparse weights.",
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="train a character model sparse and dense, convert it, generate text, compare",
        description="Train a SparseGRU while 90 %% of it is pruned, in picks and once more in blocks, and an nn.GRU "
        "the same way; convert the sparse ones, check them, let the first write, show speed and accuracy in a table. "
        "A few minutes on 2 cores.",
    )
    demo.add_argument(
        "--text", type=Path, metavar="PATH", help="a text file or a folder of them [Python's own library]"
    )
    demo.add_argument("--quick", action="store_true", help="a smaller model and fewer steps: less than a minute")
    demo.add_argument("--resume", action="store_true", help="go on after an interruption, with the same other options")
    demo.add_argument("--output", type=Path, metavar="DIR", default=Path("demo-output"), help="[%(default)s]")
    demo.add_argument("--seed", type=_natural, default=0, metavar="N", help="of weights, data order and sample [0]")
    demo.add_argument("--threads", type=_positive, metavar="N", help="for training [as many as cores, at most 4]")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="say what is installed and which backends run here, and why not")
    doctor.set_defaults(run=_doctor)

    report = commands.add_parser(
        "report",
        help="show density, bytes and multiply-accumulates of a checkpoint",
        description="Show the density of each recurrent weight and gate of a checkpoint, how to_sparse() would store "
        "it on this machine (in picks or in blocks), the bytes it then takes, and multiply-accumulates per step. FILE "
        "is a .safetensors file or what torch.save wrote of a state_dict.",
    )
    report.add_argument("file", type=Path, metavar="FILE")
    report.set_defaults(run=_report)

    export = commands.add_parser(
        "export-c",
        help="write the layers of a converted model as plain C",
        description="Write a runtime in C11 and the weights of converted layers to FOLDER: each layer by itself, or "
        "those that --chain names, one after another, as one. FILE is what save_sparse() wrote.",
    )
    export.add_argument("file", type=Path, metavar="FILE")
    export.add_argument("folder", type=Path, metavar="FOLDER")
    export.add_argument(
        "--chain",
        nargs="+",
        metavar="LAYER",
        help="names of layers in the model, linear ones too, and relu, sigmoid, tanh",
    )
    export.add_argument("--name", metavar="NAME", help="of the files and constants [the layers' names, or model]")
    export.add_argument("--array", action="store_true", help="write weights as a C array, not as a file to be read")
    export.set_defaults(run=_export_c)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"the demo needs {' and '.join(missing)}: pip install 'triton-sparse-rnn[demo]'")
    from triton_sparse_rnn.demo.checkpoint import CHECKPOINT, CheckpointError
    from triton_sparse_rnn.demo.evaluation import WrongResultError
    from triton_sparse_rnn.demo.run import run_demo
    from triton_sparse_rnn.demo.settings import QUICK, Settings
    from triton_sparse_rnn.demo.text import TextError
    from triton_sparse_rnn.doctor import usable_cores

    threads = arguments.threads or min(4, usable_cores())
    settings = dataclasses.replace(QUICK if arguments.quick else Settings(), seed=arguments.seed, threads=threads)
    try:
        run_demo(settings, folder=arguments.output, text_path=arguments.text, resume=arguments.resume)
    except (TextError, CheckpointError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or arguments.output}: {error.strerror or error}")
    except WrongResultError as error:
        return _fail(f"{error}; no result is shown. Please report this as a bug", FAILED)
    except KeyboardInterrupt:
        if not (arguments.output / CHECKPOINT).exists():
            return _fail("interrupted before the first step", INTERRUPTED)
        return _fail(f"interrupted; go on with: {_resume_command(arguments)}", INTERRUPTED)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from triton_sparse_rnn.doctor import diagnosis

    print(diagnosis())
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from triton_sparse_rnn.checkpoint_files import CheckpointFileError, read_state_dict
    from triton_sparse_rnn.report import sparsity_report

    try:
        state = read_state_dict(arguments.file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about layouts and dtypes that a file happens to hold
            report = sparsity_report(state)
    except CheckpointFileError as error:
        return _fail(str(error))
    except ValueError as error:
        return _fail(f"{arguments.file}: {error}")
    except MemoryError:
        return _fail(f"{arguments.file}: there is not enough memory to read it")
    print(report)
    return 0


def _export_c(arguments: argparse.Namespace) -> int:
    from triton_sparse_rnn.errors import SparseFileError
    from triton_sparse_rnn.export.c_export import export_c
    from triton_sparse_rnn.export.saved_layers import read_model

    data = "array" if arguments.array else "blob"
    try:
        model = read_model(arguments.file, arguments.chain)
        written = export_c(model, arguments.folder, chain=arguments.chain, name=arguments.name, data=data)
    except SparseFileError as error:
        return _fail(str(error))
    except (TypeError, ValueError) as error:
        return _fail(f"{arguments.file}: {error}")
    except OSError as error:
        return _fail(f"{error.filename or arguments.file}: {error.strerror or error}")
    for path in written:
        print(f"{path.stat().st_size:>12,} bytes  {path}")
    return 0


def _fail(message: str, code: int = USER_ERROR) -> int:
    print(f"triton-sparse-rnn: {' '.join(message.splitlines())}", file=sys.stderr)
    return code


def _resume_command(arguments: argparse.Namespace) -> str:
    words = ["triton-sparse-rnn", "demo", "--resume"]
    words += ["--quick"] if arguments.quick else []
    words += ["--text", str(arguments.text)] if arguments.text is not None else []
    words += ["--output", str(arguments.output)] if arguments.output != Path("demo-output") else []
    words += ["--seed", str(arguments.seed)] if arguments.seed else []
    words += ["--threads", str(arguments.threads)] if arguments.threads else []
    return shlex.join(words)


def _whole_number(word: str, least: int) -> int:
    try:
        number = int(word)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, got {word!r}")
    if number >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, got {word}")
    return number


_natural = functools.partial(_whole_number, least=0)
_positive = functools.partial(_whole_number, least=1)


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import importlib.metadata

        print(importlib.metadata.version("triton-sparse-rnn"))
        parser.exit()
