"""Loops and origins of addresses, on machine code written by hand."""

import pytest

from tools.sass import Access, ControlFlow, global_accesses, parse, shortest_pass, time_loop

ARGUMENTS = {0x160: "weights", 0x168: "exchange", 0x170: "y"}


def listing(*lines: str, function: str = "kernel") -> str:
    """As cuobjdump prints it, 16 bytes an instruction."""
    body = "".join(f"        /*{16 * i:04x}*/    {line} ;    /* 0x0 */\n" for i, line in enumerate(lines))
    return f'\tcode for sm_90\n\t\tFunction : {function}\n\t.headerflags\t@"EF_CUDA_SM90"\n{body}\t\t..........\n'


def flow_of(*lines: str) -> ControlFlow:
    return ControlFlow(parse(listing(*lines), "kernel"))


def accesses_of(*lines: str) -> list[Access]:
    flow = flow_of(*lines)
    return list(global_accesses(flow, ARGUMENTS, time_loop(flow)))


def origins_of(*lines: str) -> list[list[str]]:
    return [sorted(access.arguments) for access in accesses_of(*lines)]


def test_parse_takes_the_function_asked_for():
    text = listing("NOP", function="other") + listing("@!P0 LDG.E.64 R4, desc[UR16][R6.64+0x10]", "EXIT")
    load, end = parse(text, "kernel")
    assert (load.address, load.predicate, load.opcode, load.kind) == (0, "!P0", "LDG.E.64", "LDG")
    assert load.operands == ("R4", "desc[UR16][R6.64+0x10]")
    assert (end.address, end.opcode, end.operands) == (16, "EXIT", ())


def test_parse_refuses_what_it_does_not_recognise():
    with pytest.raises(ValueError, match=r"'nothing' is not in the machine code, which has \['kernel'\]"):
        parse(listing("EXIT"), "nothing")
    with pytest.raises(ValueError, match="no instructions of 'kernel'"):
        parse("Function : kernel\n mov.b32 r1, r2;", "kernel")


@pytest.mark.parametrize("branch", ["BRX R4 -0x10", "BRA R4"])
def test_branches_to_computed_addresses_are_refused(branch):
    with pytest.raises(ValueError, match="cannot follow the branch"):
        flow_of(branch, "EXIT")


def test_no_loop():
    # The branch to itself behind the end, which pads every function, is not reached.
    assert time_loop(flow_of("@P0 BRA 0x20", "NOP", "EXIT", "BRA 0x30")) == frozenset()


def test_time_loop_holds_waiting_loops_and_blocks_behind_the_end():
    flow = flow_of(
        "MOV R0, RZ",  # 00
        "IADD3 R0, R0, 0x1, RZ",  # 10  the time loop begins
        "LDG.E.STRONG.GPU R1, [R2.64]",  # 20  a loop that waits
        "@P0 BRA 0x20",  # 30
        "@P1 BRA 0x80",  # 40  to the rare block
        "FADD R0, R0, R1",  # 50
        "@P2 BRA 0x10",  # 60  the time loop ends
        "EXIT",  # 70
        "FMUL R0, R0, R1",  # 80
        "BRA 0x50",  # 90  goes far back, but is no loop
    )
    loops = sorted([flow.code[i].address for i in flow.instructions(body)] for body in flow.loops())
    assert loops == [[0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x80, 0x90], [0x20, 0x30]]
    assert [flow.code[i].address for i in flow.instructions(time_loop(flow))] == loops[0]


def test_the_shortest_pass_waits_for_nothing():
    flow = flow_of(
        "MOV R0, RZ",  # 00
        "IADD3 R0, R0, 0x1, RZ",  # 10  the time loop begins
        "@!P0 BRA 0x60",  # 20  nothing to wait for
        "LDG.E.STRONG.GPU R1, [R2.64]",  # 30  a loop that waits
        "ISETP.EQ.U32.AND P0, PT, R1, -0x1, PT",  # 40
        "@P0 BRA 0x30",  # 50
        "FFMA R4, R1, R5, R4",  # 60
        "@P1 BRA 0x10",  # 70
        "EXIT",  # 80
    )
    shortest = shortest_pass(flow, time_loop(flow))
    assert [flow.code[i].address for i in shortest] == [0x10, 0x20, 0x60, 0x70]
    assert shortest_pass(flow, frozenset()) == []


def test_the_shortest_pass_looks_once_where_it_must():
    flow = flow_of(
        "MOV R0, RZ",  # 00
        "LDG.E.STRONG.GPU R1, [R2.64]",  # 10  the time loop begins
        "@P0 BRA 0x20",  # 20  waits
        "FFMA R4, R1, R5, R4",  # 30
        "@P1 BRA 0x10",  # 40
        "EXIT",  # 50
    )
    assert [flow.code[i].address for i in shortest_pass(flow, time_loop(flow))] == [0x10, 0x20, 0x30, 0x40]


def test_a_call_may_be_a_branch():
    # sm_80 leaves the loop by a call that never returns.
    flow = flow_of("NOP", "FADD R0, R0, R1", "@!P3 CALL.REL.NOINC 0x40", "BRA 0x10", "EXIT")
    assert [flow.code[i].address for i in flow.instructions(time_loop(flow))] == [0x10, 0x20, 0x30]


@pytest.mark.parametrize("branch", ["BRA.U UP1, 0x0", "@UP1 BRA 0x0", "BRA.DIV ~URZ, 0x0", "@!P0 BRA P1, 0x0"])
def test_conditional_branches_go_on(branch):
    assert len(flow_of("NOP", branch, "STG.E [R2.64], R1", "EXIT").successors[0]) == 2


@pytest.mark.parametrize(
    "lines",
    [
        ["IADD3 R6, P2, R84, c[0x0][0x168], RZ", "IADD3.X R7, R83, c[0x0][0x16c], RZ, P2, !PT"],
        ["LDC.64 R6, c[0x0][0x168]"],
        ["ULDC.64 UR4, c[0x0][0x168]", "LEA R6, P3, R0, UR4, 0x2"],
        ["LDCU.128 UR4, c[0x0][0x160]", "IMAD.WIDE.U32 R6, R0, 0x4, UR6"],
        ["LDC.64 R2, c[0x0][0x168]", "@P0 MOV R6, R2", "@!P0 IADD3 R6, R2, 0x4, RZ"],
        ["LDC.64 R6, c[0x0][0x160]", "LDC.64 R6, c[0x0][0x168]"],  # overwritten
        ["LDC.64 R6, c[0x0][0x160]", "LDG.E.128 R4, [R6.64]", "IMAD.WIDE R6, R6, 0x4, c[0x0][0x168]"],  # loaded
        ["ISETP.LT.U32.AND P0, PT, R6, c[0x0][0x160], PT", "LDC.64 R6, c[0x0][0x168]"],
        ["LDC.64 R6, c[0x0][0x168]", "ISETP.LT.U32.AND P0, PT, R6, c[0x0][0x160], PT"],
        ["LDC.64 R6, c[0x0][0x168]", "BRA 0x30", "LDC.64 R6, c[0x0][0x160]"],  # not reached
    ],
)
def test_origin_of_an_address(lines):
    assert origins_of(*lines, "STG.E.STRONG.SYS [R6.64], R45", "EXIT")[-1] == ["exchange"]


def test_origins_meet_where_ways_meet():
    lines = ["LDC.64 R6, c[0x0][0x160]", "@P0 BRA 0x30", "LDC.64 R6, c[0x0][0x168]", "STG.E [R6.64], R0", "EXIT"]
    assert origins_of(*lines) == [["exchange", "weights"]]


def test_a_predicated_write_keeps_the_old_origin():
    lines = ["LDC.64 R6, c[0x0][0x160]", "@P0 MOV R6, c[0x0][0x168]", "STG.E [R6.64], R0", "EXIT"]
    assert origins_of(*lines) == [["exchange", "weights"]]


def test_origins_go_round_a_loop():
    lines = ["LDC.64 R6, c[0x0][0x160]", "LDC.64 R2, c[0x0][0x168]", "LDG.E R0, [R6.64]", "MOV R6, R2", "@P0 BRA 0x20"]
    assert origins_of(*lines, "EXIT") == [["exchange", "weights"]]


def test_a_descriptor_and_what_was_loaded_are_no_origin():
    lines = ["ULDC.64 UR4, c[0x0][0x160]", "LDC.64 R2, c[0x0][0x168]", "LDG.E R6, desc[UR4][R2.64+UR8]"]
    assert origins_of(*lines, "LDG.E R1, [R6.64]", "EXIT") == [["exchange"], []]


def test_accesses_in_and_outside_of_the_time_loop():
    weights, poll, store, asynchronous, last = accesses_of(
        "LDC.64 R2, c[0x0][0x168]",
        "LDG.E.128 R4, [R8.64]",
        "LDG.E.STRONG.GPU R1, [R2.64]",
        "STG.E.STRONG.SYS [R2.64], R0",
        "LDGSTS.E.128 [R5], desc[UR16][R2.64]",
        "@P0 BRA 0x20",
        "STG.E [R2.64], R0",
        "EXIT",
    )
    assert [a.in_time_loop for a in (weights, poll, store, asynchronous, last)] == [False, True, True, True, False]
    assert [a.strong for a in (weights, poll, store, asynchronous, last)] == [False, True, True, False, False]
    assert [a.writes for a in (weights, poll, store, asynchronous, last)] == [False, False, True, False, True]
    assert asynchronous.arguments == {"exchange"}
