"""Reading a GPU's machine code (SASS, as cuobjdump prints it): its loops, and what each memory access belongs to.

    /*0f30*/   @P0 LDG.E.STRONG.GPU R97, desc[UR16][R70.64+0x10] ;
      address      opcode           operands

Loops are natural loops of the control flow graph: a branch back to a block that dominates it. Text order would not do,
because compilers put rare blocks behind the end of the function and branch back from there.

A memory access belongs to the pointer arguments that its address is computed from. Arguments lie in constant bank 0,
and arithmetic hands on from its sources to its destination where a value comes from. A value loaded from global memory
comes from nowhere, one from shared memory from all that was put there. Of an address only the low word is followed.
"""

from __future__ import annotations

import heapq
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*?)\s*;")
_REGISTER = re.compile(r"\bU?R\d+\b")
_PREDICATE = re.compile(r"!?~?U?P(?:\d|T|R)\b")
_CONSTANT = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]")
_BRANCHES = {"BRA", "CALL", "JMP"}
_ENDS = {"EXIT", "RET", "KILL", "BPT"}
_INDIRECT = {"BRX", "BRXU", "JMX", "JMXU"}
_CONSTANT_LOADS = {"LDC", "LDCU", "ULDC"}
_GLOBAL = {"LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG", "LDGSTS"}


@dataclass(frozen=True)
class Instruction:
    """One line: `opcode` with its modifiers ("LDG.E.64"), `predicate` None or as "!P0"."""

    address: int
    predicate: str | None
    opcode: str
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Access:
    """One instruction that reads or writes global memory.

    arguments: names of the pointer arguments that its address is computed from; normally one.
    in_time_loop: it runs at every step.
    """

    opcode: str
    arguments: frozenset[str]
    in_time_loop: bool

    @property
    def strong(self) -> bool:
        """Single-copy atomic towards other programs' strong accesses."""
        return ".STRONG" in self.opcode

    @property
    def writes(self) -> bool:
        """It is a store; atomics, which do both, are not used here."""
        return self.opcode.startswith("ST")


def parse(listing: str, function: str) -> list[Instruction]:
    """Return the instructions of one function in the output of `cuobjdump -sass`."""
    sections = re.split(r"^\s*Function : (\S+)\s*$", listing, flags=re.MULTILINE)
    bodies = dict(zip(sections[1::2], sections[2::2], strict=True))
    if function not in bodies:
        raise ValueError(f"function {function!r} is not in the machine code, which has {sorted(bodies)}")
    code = []
    for match in _LINE.finditer(bodies[function]):
        address, predicate, opcode, operands = match.groups()
        code.append(Instruction(int(address, 16), predicate, opcode, tuple(filter(None, re.split(r",\s*", operands)))))
    if not code or code[0].address != 0:
        raise ValueError(f"no instructions of {function!r} were recognised in the machine code")
    return code


class ControlFlow:
    """Basic blocks of a function, as ranges of indices into its instructions, and where each leads."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        index = {instruction.address: i for i, instruction in enumerate(code)}
        targets = {i: index[_target(code[i])] for i in range(len(code)) if code[i].kind in _BRANCHES}
        leaders = sorted({0, *targets.values(), *(i + 1 for i in range(len(code) - 1) if _leaves(code[i]))})
        self.blocks = [range(a, b) for a, b in zip(leaders, [*leaders[1:], len(code)], strict=True)]
        number = {block.start: n for n, block in enumerate(self.blocks)}
        self.successors = []
        for n, block in enumerate(self.blocks):
            last = code[block[-1]]
            following = [number[targets[block[-1]]]] if block[-1] in targets else []
            if _falls_through(last) and n + 1 < len(self.blocks):
                following.append(n + 1)
            self.successors.append(following)

    def loops(self) -> list[frozenset[int]]:
        """Return the blocks of each natural loop, one per header."""
        dominators = self._dominators()
        predecessors: list[list[int]] = [[] for _ in self.blocks]
        for n, following in enumerate(self.successors):
            for m in following:
                predecessors[m].append(n)
        bodies: dict[int, set[int]] = {}
        for n, following in enumerate(self.successors):
            for header in following:
                if dominators[n] >> header & 1:
                    body = bodies.setdefault(header, {header})
                    waiting = [n]
                    while waiting:
                        block = waiting.pop()
                        if block not in body:
                            body.add(block)
                            waiting += predecessors[block]
        return [frozenset(body) for body in bodies.values()]

    def instructions(self, blocks: frozenset[int]) -> list[int]:
        """Return indices of the instructions of blocks, in their order."""
        return [i for n in sorted(blocks) for i in self.blocks[n]]

    def _dominators(self) -> list[int]:
        """For each block a bit set of those on every way to it; 0 where no way leads."""
        everything = (1 << len(self.blocks)) - 1
        found = [everything] * len(self.blocks)
        found[0] = 1
        reached = {0}
        waiting = [0]
        while waiting:
            n = waiting.pop()
            for m in self.successors[n]:
                new = found[m] & found[n] | 1 << m if m else 1
                if new != found[m] or m not in reached:
                    found[m] = new
                    reached.add(m)
                    waiting.append(m)
        return [found[n] if n in reached else 0 for n in range(len(self.blocks))]


def time_loop(flow: ControlFlow) -> frozenset[int]:
    """Return the blocks of the loop that has the most instructions; none without loops."""
    return max(flow.loops(), key=lambda body: len(flow.instructions(body)), default=frozenset())


def shortest_pass(flow: ControlFlow, body: frozenset[int]) -> list[int]:
    """Return indices of the instructions on the way through a loop's body, once around, that has the fewest.

    A loop within it is entered only where every way does, and no way leads around it twice.
    """
    if not body:
        return []
    header = next(n for n in body if any(n not in body for n in _predecessors(flow, n)))
    lengths: dict[int, int] = {header: 0}
    before: dict[int, int] = {}
    heap, done = [(0, header)], set()
    while heap:
        length, n = heapq.heappop(heap)
        if n in done:
            continue
        done.add(n)
        for m in flow.successors[n]:
            onward = length + len(flow.blocks[n])
            if m == header:
                way = [n]
                while way[-1] != header:
                    way.append(before[way[-1]])
                return [i for block in reversed(way) for i in flow.blocks[block]]
            if m in body and onward < lengths.get(m, sys.maxsize):
                lengths[m], before[m] = onward, n
                heapq.heappush(heap, (onward, m))
    raise AssertionError("a loop leads back to its header")


def _predecessors(flow: ControlFlow, block: int) -> list[int]:
    return [n for n, following in enumerate(flow.successors) if block in following]


class Origin(NamedTuple):
    """Which pointer arguments a value is computed from, as bit sets.

    surely: on every way that leads here; perhaps: on some way, or if a predicated write did not happen. An address has
    one argument, so where one is sure, the others are left over in registers from other uses.
    """

    surely: int = 0
    perhaps: int = 0

    def combined(self, other: Origin) -> Origin:
        """Of a result that both values go into."""
        return Origin(self.surely | other.surely, self.perhaps | other.perhaps)

    def either(self, other: Origin) -> Origin:
        """Of a value that is one or the other."""
        return Origin(self.surely & other.surely, self.perhaps | other.perhaps)


_NOWHERE = Origin()
_State = dict[str, Origin]  # by register, word of the stack ("stack 16"), and "shared", which is all of shared memory


def global_accesses(flow: ControlFlow, arguments: Mapping[int, str], step: frozenset[int]) -> tuple[Access, ...]:
    """Return every access to global memory in the code that can be reached.

    Args:
        flow: of the function.
        arguments: offset in constant bank 0 -> name, for each pointer argument.
        step: blocks of the time loop.
    """
    names = list(arguments.values())
    bits = {offset: Origin(1 << i, 1 << i) for i, offset in enumerate(arguments)}
    accesses = []
    for n, entry in _states(flow, bits).items():
        state = dict(entry)
        for i in flow.blocks[n]:
            instruction = flow.code[i]
            if instruction.kind in _GLOBAL:
                origin = _origin_of(_address(instruction), state, bits)
                belongs = origin.surely or origin.perhaps
                found = frozenset(name for j, name in enumerate(names) if belongs >> j & 1)
                accesses.append(Access(instruction.opcode, found, n in step))
            _execute(instruction, state, bits)
    return tuple(accesses)


def _states(flow: ControlFlow, bits: Mapping[int, Origin]) -> dict[int, _State]:
    """Return where values come from on entry into each block that can be reached."""
    states: dict[int, _State] = {0: {}}
    waiting = [0]
    while waiting:
        n = waiting.pop()
        state = dict(states[n])
        for i in flow.blocks[n]:
            _execute(flow.code[i], state, bits)
        for m in flow.successors[n]:
            known = states.get(m)
            merged = state if known is None else _either(known, state)
            if merged != known:
                states[m] = merged
                waiting.append(m)
    return states


def _either(a: _State, b: _State) -> _State:
    return {place: a.get(place, _NOWHERE).either(b.get(place, _NOWHERE)) for place in a.keys() | b.keys()}


def _execute(instruction: Instruction, state: _State, bits: Mapping[int, Origin]) -> None:
    """Note where the values come from that an instruction writes."""
    if instruction.kind in ("STS", "STL"):
        places = _on_chip(instruction)
        words = [state.get(register, _NOWHERE) for register in _registers(instruction.operands[-1], instruction)]
    else:
        operands = [operand for operand in instruction.operands if not _PREDICATE.fullmatch(operand)]
        if not operands or "SETP" in instruction.kind or instruction.kind in _BRANCHES:
            return
        places = _registers(operands[0], instruction)
        words = [_NOWHERE] * len(places)
        if instruction.kind in _CONSTANT_LOADS:
            if constant := _CONSTANT.search(operands[1]):
                words = [bits.get(int(constant[1], 16) + 4 * i, _NOWHERE) for i in range(len(words))]
        elif instruction.kind in ("LDS", "LDL"):
            words = [state.get(place, _NOWHERE) for place in _on_chip(instruction)]
        elif places and not instruction.kind.startswith(("LD", "ATOM")):
            sources = (_origin_of(source, state, bits) for source in operands[1:])
            words[0] = reduce(Origin.combined, sources, _NOWHERE)
    for place, origin in zip(places, words, strict=False):
        if place == "shared" or instruction.predicate:  # what was there before may still be there
            origin = origin.either(state.get(place, _NOWHERE))
        state[place] = origin


def _origin_of(operand: str, state: _State, bits: Mapping[int, Origin]) -> Origin:
    constant = _CONSTANT.search(operand)
    origin = bits.get(int(constant[1], 16), _NOWHERE) if constant else _NOWHERE
    for register in _REGISTER.findall(operand):
        origin = origin.combined(state.get(register, _NOWHERE))
    return origin


def _registers(operand: str, instruction: Instruction) -> list[str]:
    """Return the registers, as many as the instruction is wide, of an operand that is no address."""
    first = re.match(r"(U?R)(\d+)", operand)
    return [f"{first[1]}{int(first[2]) + i}" for i in range(_width(instruction))] if first else []


def _on_chip(instruction: Instruction) -> list[str]:
    """Return the places in _State of the words of shared memory or of the stack that are read or written."""
    if instruction.kind.endswith("S"):
        return ["shared"] * _width(instruction)
    offset = re.search(r"\[R1(?:\+(-?0x[0-9a-f]+))?\]", " ".join(instruction.operands))
    if not offset:
        raise ValueError(f"cannot tell the place in the stack of {instruction}")
    return [f"stack {int(offset[1] or '0', 0) + 4 * i}" for i in range(_width(instruction))]


def _address(instruction: Instruction) -> str:
    """The operand of the address in global memory, without its descriptor."""
    brackets = [operand for operand in instruction.operands if "[" in operand]
    return re.sub(r"desc\[\w+\]", "", brackets[-1])


def _width(instruction: Instruction) -> int:
    """Words that an instruction writes."""
    modifiers = instruction.opcode.split(".")[1:]
    if "128" in modifiers:
        return 4
    if "64" in modifiers or "WIDE" in modifiers or (instruction.kind == "CS2R" and "32" not in modifiers):
        return 2
    return 1


def _target(branch: Instruction) -> int:
    if not branch.operands or not branch.operands[-1].startswith("0x"):
        raise ValueError(f"cannot follow the branch {branch}")
    return int(branch.operands[-1], 16)


def _leaves(instruction: Instruction) -> bool:
    if instruction.kind in _INDIRECT:
        raise ValueError(f"cannot follow the branch {instruction}")
    return instruction.kind in _BRANCHES or instruction.kind in _ENDS


def _falls_through(instruction: Instruction) -> bool:
    """True when what comes next may run next: all but an unconditional branch or end."""
    if not _leaves(instruction) or instruction.predicate or instruction.kind == "CALL":
        return True
    return instruction.kind == "BRA" and len(instruction.operands) > 1
