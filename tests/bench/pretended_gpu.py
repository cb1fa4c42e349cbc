"""Runs a program of the benchmarks as on a GPU, where there is none: Triton interprets, and layers are small.

python pretended_gpu.py -m bench.gpu.warm smoke
"""

import importlib
import os
import runpy
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"

import torch

SMALL = {512: 24, 1024: 40, 2560: 56}  # by H
PROPERTIES = types.SimpleNamespace(name="a pretended GPU", major=9, minor=0, multi_processor_count=132)


class Event:
    """Ticks once for each event."""

    now = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.now += 1
        self.time = Event.now

    def elapsed_time(self, end: "Event") -> float:
        return (end.time - self.time) * 0.5


def pretend() -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda *_: PROPERTIES
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.Event = Event  # type: ignore[misc, assignment]
    from bench.gpu import machine

    names = ("gpu", "sms", "driver", "cuda", "cudnn", "triton")
    facts = dict.fromkeys(names, "pretended") | {"copy_bandwidth": 1e12}
    machine.gpu_facts = lambda: facts  # type: ignore[assignment]
    from bench import workloads

    make = workloads.Workload.__init__

    def make_small(self: workloads.Workload, **fields: object) -> None:
        make(self, **{**fields, "H": SMALL.get(fields["H"], fields["H"]), "T": 2, "device": "cpu"})  # type: ignore[arg-type, call-overload]

    workloads.Workload.__init__ = make_small  # type: ignore[method-assign]
    own = workloads.Workload.facts
    workloads.Workload.facts = lambda self: own(self) | facts  # type: ignore[method-assign]
    from bench.gpu import contenders

    contenders.replayed = lambda run: run
    contenders.EVENT_SECONDS = 0


if __name__ == "__main__":
    pretend()
    assert sys.argv[1] == "-m"
    name, arguments = sys.argv[2], sys.argv[3:]
    sys.argv = [name, *arguments]
    if name == "pytest":
        runpy.run_module("pytest", run_name="__main__")
    else:
        sys.exit(importlib.import_module(name).main())
