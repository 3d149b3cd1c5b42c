"""The emulator itself: what its instructions compute, what it refuses, and that it finds the faults that are planted,
in small programs and in the forward's own code, and no others.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emulated_cases import BY_NAME
from ptx_emulator import Findings, GlobalMemory, Program, PtxError, emulated, execute
from ptx_emulator.asynchronous import TensorMap
from ptx_emulator.launch import SHARED_LIMIT

from groupdpo_kernels.kernels.linear_logps_forward import linear_logps_forward
from groupdpo_kernels.testing import check_budget, make_inputs

# Thread t has %r0 = t, its operands in %rd4 to %rd6 (as %r1 to %r3, %f1 to %f3 too), its result's address in %rd3.
MODULE = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry probe(
    .param .u64 probe_in,
    .param .u64 probe_out
)
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .f32 %f<9>; .reg .b64 %rd<30>;
    mov.u32 %r0, %tid.x;
    ld.param.u64 %rd0, [probe_in];
    ld.param.u64 %rd1, [probe_out];
    mad.wide.u32 %rd2, %r0, 24, %rd0;
    mad.wide.u32 %rd3, %r0, 8, %rd1;
    ld.global.b64 %rd4, [%rd2];
    ld.global.b64 %rd5, [%rd2+8];
    ld.global.b64 %rd6, [%rd2+16];
    cvt.u32.u64 %r1, %rd4;
    cvt.u32.u64 %r2, %rd5;
    cvt.u32.u64 %r3, %rd6;
    mov.b32 %f1, %r1;
    mov.b32 %f2, %r2;
    mov.b32 %f3, %r3;
    {body}
    ret;
}}
"""


def probe(
    body: str, *operands: Any, threads: int = 64, shared: int = 4096, blocks: int = 1
) -> tuple[np.ndarray[Any, Any], Findings]:
    """What each thread stores, as 64 bits, and what was found. Operands: an array for all threads, or a number."""
    given = np.zeros((threads, 3), np.uint64)
    for k, operand in enumerate(operands):
        values = np.broadcast_to(operand, (threads,))
        given[:, k] = (
            values.astype(values.dtype).view(f"u{values.dtype.itemsize}")
            if values.flags.c_contiguous
            else (np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}"))
        )
    out = np.zeros(threads, np.uint64)
    memory, findings = GlobalMemory(), Findings()
    addresses = []
    for array, what in ((given, "the operands"), (out, "the results")):
        addresses.append(array.ctypes.data)
        memory.add(array.ctypes.data, array.reshape(-1).view(np.uint8), what)
    program = Program(MODULE.format(threads=threads, body=body), "probe")
    execute(program, blocks, addresses, memory, findings, shared)
    return out, findings


# --------------------------------------------------------------------------------------------------------- instructions

I32, U32, F32 = np.int32, np.uint32, np.float32
NAN, INF = float("nan"), float("inf")
# (instruction, operands, result as 32 bits of the dtype of the last)
COMPUTED: list[tuple[str, tuple[Any, ...], Any]] = [
    ("add.s32 %r9, %r1, %r2;", (I32(2**31 - 1), I32(1)), I32(-(2**31))),
    ("mul.lo.s32 %r9, %r1, %r2;", (I32(-70000), I32(70000)), I32(-605032704)),
    ("mul.hi.u32 %r9, %r1, %r2;", (U32(2**31), U32(6)), U32(3)),
    ("div.s32 %r9, %r1, %r2;", (I32(-7), I32(2)), I32(-3)),
    ("rem.s32 %r9, %r1, %r2;", (I32(-7), I32(2)), I32(-1)),
    ("shl.b32 %r9, %r1, %r2;", (U32(1), U32(40)), U32(0)),
    ("shr.s32 %r9, %r1, %r2;", (I32(-8), U32(40)), I32(-1)),
    ("shr.u32 %r9, %r1, 4;", (U32(0xF0),), U32(0xF)),
    ("bfe.u32 %r9, %r1, 4, 8;", (U32(0xABCD),), U32(0xBC)),
    ("bfe.s32 %r9, %r1, 4, 8;", (U32(0xABCD),), I32(0xBC - 256)),
    ("bfi.b32 %r9, %r1, %r2, 8, 4;", (U32(0x5), U32(0xFFFFFFFF)), U32(0xFFFFF5FF)),
    ("prmt.b32 %r9, %r1, %r2, 0x7610;", (U32(0x33221100), U32(0x77665544)), U32(0x77661100)),
    ("lop3.b32 %r9, %r1, %r2, %r3, 0xE8;", (U32(0b1100), U32(0b1010), U32(0b0110)), U32(0b1110)),
    ("popc.b32 %r9, %r1;", (U32(0xF0F),), U32(8)),
    ("clz.b32 %r9, %r1;", (U32(0xF0F),), U32(20)),
    ("brev.b32 %r9, %r1;", (U32(1),), U32(2**31)),
    ("bfind.shiftamt.u32 %r9, %r1;", (U32(1),), U32(31)),
    ("shf.r.wrap.b32 %r9, %r1, %r2, 8;", (U32(0x11223344), U32(0xAABBCCDD)), U32(0xDD112233)),
    ("max.f32 %f4, %f1, %f2; mov.b32 %r9, %f4;", (F32(NAN), F32(3)), F32(3)),
    ("max.NaN.f32 %f4, %f1, %f2; setp.nan.f32 %p1, %f4, %f4; selp.b32 %r9, 1, 0, %p1;", (F32(NAN), F32(3)), U32(1)),
    ("mul.ftz.f32 %f4, %f1, %f2; mov.b32 %r9, %f4;", (F32(1e-30), F32(1e-10)), F32(0)),
    ("mul.f32 %f4, %f1, %f2; mov.b32 %r9, %f4;", (F32(1e-30), F32(1e-10)), F32(1e-30) * F32(1e-10)),
    # Rounded once: the product alone would round to 1.
    ("fma.rn.f32 %f4, %f1, %f2, %f3; mov.b32 %r9, %f4;", (F32(1 + 2**-23), F32(1 - 2**-23), F32(-1)), F32(-(2.0**-46))),
    ("cvt.rzi.s32.f32 %r9, %f1;", (F32(-2.7),), I32(-2)),
    ("cvt.rzi.s32.f32 %r9, %f1;", (F32(1e20),), I32(2**31 - 1)),
    ("cvt.rzi.s32.f32 %r9, %f1;", (F32(NAN),), I32(0)),
    ("cvt.rni.f32.f32 %f4, %f1; mov.b32 %r9, %f4;", (F32(2.5),), F32(2)),
    # Ties to even, upwards and downwards.
    ("cvt.rn.bf16x2.f32 %r9, %f1, %f2;", (F32(1 + 3 * 2**-8), F32(1 + 2**-8)), U32(0x3F823F80)),
    ("cvt.rn.f16x2.f32 %r9, %f1, %f2;", (F32(1.5), F32(70000)), U32(0x3E007C00)),
    ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1};", (U32(0x11223344),), U32(0x33441122)),
    ("cvt.u16.u32 %rs1, %r1; cvt.s32.s16 %r9, %rs1;", (U32(0x18000),), I32(-32768)),
    ("setp.ne.f32 %p1, %f1, %f2; selp.b32 %r9, 1, 0, %p1;", (F32(NAN), F32(3)), U32(0)),
    ("setp.neu.f32 %p1, %f1, %f2; selp.b32 %r9, 1, 0, %p1;", (F32(NAN), F32(3)), U32(1)),
    ("setp.ltu.f32 %p1, %f1, %f2; selp.b32 %r9, 1, 0, %p1;", (F32(NAN), F32(3)), U32(1)),
    ("setp.gt.u32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;", (I32(-1), U32(3)), U32(1)),
    ("setp.eq.u32 %p1, %r1, 5; setp.lt.and.s32 %p2|%p3, %r2, 3, %p1; selp.b32 %r9, 1, 0, %p3;", (U32(5), I32(7)),
        U32(1)),
    ("ex2.approx.ftz.f32 %f4, %f1; mov.b32 %r9, %f4;", (F32(-3),), F32(0.125)),
    ("lg2.approx.f32 %f4, %f1; mov.b32 %r9, %f4;", (F32(0),), F32(-INF)),
    ("rsqrt.approx.ftz.f32 %f4, %f1; mov.b32 %r9, %f4;", (F32(16),), F32(0.25)),
]  # fmt: skip


@pytest.mark.parametrize(("body", "operands", "result"), COMPUTED, ids=[row[0].split(";")[0] for row in COMPUTED])
def test_instruction(body: str, operands: tuple[Any, ...], result: Any) -> None:
    out, findings = probe(f"{body} st.global.b32 [%rd3], %r9;", *operands, threads=32)
    assert not findings
    np.testing.assert_array_equal(out.astype(U32), np.broadcast_to(result.view(U32), (32,)))


LANES = np.arange(64, dtype=U32)
WARPS: list[tuple[str, Callable[[np.ndarray[Any, Any]], Any]]] = [
    ("shfl.sync.bfly.b32 %r9, %r0, 5, 31, -1;", lambda t: t ^ 5),
    ("shfl.sync.up.b32 %r9, %r0, 3, 0, -1;", lambda t: np.where(t % 32 < 3, t, t - 3)),
    ("shfl.sync.down.b32 %r9|%p1, %r0, 3, 31, -1; selp.b32 %r9, %r9, 77, %p1;",
        lambda t: np.where(t % 32 > 28, 77, t + 3)),
    ("shfl.sync.idx.b32 %r9, %r0, 2, 0x181f, -1;", lambda t: t // 8 * 8 + 2),
    ("setp.lt.u32 %p1, %r0, 40; vote.sync.ballot.b32 %r9, %p1, -1;", lambda t: np.where(t < 32, 2**32 - 1, 255)),
    ("setp.lt.u32 %p1, %r0, 40; vote.sync.all.pred %p2, %p1, -1; selp.u32 %r9, 1, 0, %p2;", lambda t: t < 32),
    ("redux.sync.max.s32 %r9, %r0, -1;", lambda t: t // 32 * 32 + 31),
    ("elect.sync %r9|%p1, -1; selp.u32 %r9, 1, 0, %p1;", lambda t: t % 32 == 0),
]  # fmt: skip


@pytest.mark.parametrize(("body", "result"), WARPS, ids=[row[0].split(";")[0] for row in WARPS])
def test_instruction_of_a_warp(body: str, result: Callable[[np.ndarray[Any, Any]], Any]) -> None:
    out, findings = probe(f"{body} st.global.b32 [%rd3], %r9;")
    assert not findings
    np.testing.assert_array_equal(out.astype(U32), np.asarray(result(LANES)).astype(U32))


def test_threads_that_branch_apart_meet_again() -> None:
    """Each loops as often as its number says, and the sum of a warp is taken by all its lanes."""
    out, findings = probe("""
        mov.u32 %r9, 0; mov.u32 %r10, 0;
    again: setp.ge.u32 %p1, %r10, %r0; @%p1 bra done;
        add.u32 %r9, %r9, %r10; add.u32 %r10, %r10, 1; bra.uni again;
    done: redux.sync.add.u32 %r9, %r9, -1; st.global.b32 [%rd3], %r9;""")
    assert not findings
    sums = (LANES * (LANES - 1.0) / 2).reshape(2, 32).sum(1)
    np.testing.assert_array_equal(out, np.repeat(sums, 32).astype(np.uint64))


def test_they_meet_where_the_text_is_not_in_the_order_of_the_flow() -> None:
    """A loop whose end stands above its beginning, as a compiler lays out a logarithm with rare cases."""
    out, findings = probe("""
        mov.u32 %r9, 0; mov.u32 %r10, 0; and.b32 %r11, %r0, 1; setp.eq.u32 %p2, %r11, 1; bra.uni begin;
    even: mov.u32 %r11, %r0;
    end: redux.sync.add.u32 %r12, %r11, -1; add.u32 %r9, %r9, %r12; add.u32 %r10, %r10, 1;
        setp.lt.u32 %p1, %r10, 3; @%p1 bra begin; bra.uni done;
    begin: @%p2 bra odd; bra.uni even;
    odd: mov.u32 %r11, 7; bra.uni end;
    done: st.global.b32 [%rd3], %r9;""")
    assert not findings
    sums = np.where(LANES % 2 == 0, LANES, 7).reshape(2, 32).sum(1)
    np.testing.assert_array_equal(out, 3 * np.repeat(sums, 32).astype(np.uint64))


def test_blocks_have_their_own_shared_memory() -> None:
    body = """
        mad.wide.u32 %rd7, %r0, 8, %rd1; mov.u32 %r1, %ctaid.x; shl.b32 %r2, %r0, 2; mov.b32 %r3, memory;
        add.u32 %r2, %r2, %r3; st.shared.b32 [%r2], %r1; bar.sync 0; ld.shared.b32 %r9, [%r2];
        setp.eq.u32 %p1, %r1, 2; @%p1 st.global.b32 [%rd7], %r9;"""
    out, findings = probe(body, blocks=4)
    assert not findings and (out == 2).all()


LOCAL = """
    .local .align 8 .b8 stack[24];
    mov.b32 %r10, stack; cvt.u64.u32 %rd10, %r10; cvta.local.u64 %rd10, %rd10;
    mov.b32 %r11, 7; st.b32 [%rd10+8], %r1; st.b32 [%rd10+12], %r11;
    ld.b64 %rd11, [%rd10+{at}]; st.global.b64 [%rd3], %rd11;
"""


def test_each_thread_has_its_own_local_memory() -> None:
    """Compilers put there what they index by registers."""
    found, findings = probe(LOCAL.format(at=8), np.arange(64, dtype=np.uint32), blocks=2)
    assert found.tolist() == [7 << 32 | t for t in range(64)] and not findings
    unwritten, _ = probe(LOCAL.format(at=16), U32(0))
    assert (unwritten == 2**64 - 1).all()  # NaN as a float


# ---------------------------------------------------------------------------------------- faults, in small programs

# The address of the thread's own word in %r5, of its neighbour's in the other warp in %r6.
WORDS = """
    mov.b32 %r4, memory; shl.b32 %r5, %r0, 2; xor.b32 %r6, %r5, 128; add.u32 %r5, %r5, %r4; add.u32 %r6, %r6, %r4;"""
BYTES = "mov.b32 %r4, memory; add.u32 %r5, %r4, %r0;"
FOUND = [
    ("no barrier", WORDS + "st.shared.b32 [%r5], %r0; ld.shared.b32 %r9, [%r6];", "read of what another warp wrote"),
    ("written too soon", WORDS + "st.shared.b32 [%r5], %r0; bar.sync 0; ld.shared.b32 %r9, [%r6]; "
        "st.shared.b32 [%r5], %r9;", "write over what another warp reads"),
    ("two values", WORDS + "shr.u32 %r7, %r0, 5; st.shared.b32 [%r4], %r7;", "two threads write one place at once"),
    ("nothing written", WORDS + "ld.shared.b32 %r9, [%r5];", "shared memory that nothing has written"),
    ("a lane is missing", "setp.lt.u32 %p1, %r0, 7; @%p1 shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1;", "do not take part"),
    ("a register", "setp.eq.u32 %p1, %r0, 99; @%p1 mov.u32 %r30, 1; st.global.b32 [%rd3], %r30;",
        "%r30 is read before it is written"),
    ("an early copy", WORDS + "cp.async.ca.shared.global [%r5], [%rd0], 4; cp.async.commit_group; "
        "ld.shared.b32 %r9, [%r5]; cp.async.wait_group 0;", "a wait is missing"),
    ("a copy too soon", WORDS + "st.shared.b32 [%r5], %r0; bar.sync 0; ld.shared.b32 %r9, [%r6]; "
        "cp.async.ca.shared.global [%r5], [%rd0], 4; cp.async.wait_all;", "a copy begins over what another warp reads"),
    ("a copy of others", WORDS + "cp.async.ca.shared.global [%r5], [%rd0], 4; cp.async.wait_all; "
        "ld.shared.b32 %r9, [%r6];", "read of what another warp wrote"),
    ("no wait at all", WORDS + "cp.async.ca.shared.global [%r5], [%rd0], 4; cp.async.commit_group;",
        "a copy is under way where the program ends"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "what"), [row[1:] for row in FOUND], ids=[row[0] for row in FOUND])
def test_what_depends_on_time_is_found(body: str, what: str) -> None:
    _, findings = probe(body)
    assert any(what in finding for finding in findings), findings


RAISED = [
    ("past a tensor", "st.global.b64 [%rd3+8], %rd4;", "out of bounds: .* of the results, which has 512; 1 threads"),
    ("no tensor", "ld.global.b32 %r9, [%rd4];", "out of bounds: .* is of no tensor"),
    ("two elements", "ld.global.v2.b64 {%rd7, %rd8}, [%rd2];", "misaligned: .* for 16 bytes"),
    ("shared, past the end", WORDS + "st.shared.b32 [%r5+3900], %r0;",
        "out of bounds: .* of 4096 bytes of shared memory"),
    ("shared, before it", WORDS + "st.shared.b32 [%r5+-4], %r0;", "out of bounds: .* bytes -4 to 0"),
    ("shared, two words", WORDS + "st.shared.v2.b32 [%r5], {%r0, %r0};", "misaligned: .* shared memory, 8 bytes"),
    ("a barrier for some", "setp.lt.u32 %p1, %r0, 32; @%p1 bra there; bar.sync 0; bra.uni last; there: "
        "mbarrier.init.shared.b64 [memory], 1; again: mbarrier.try_wait.parity.shared.b64 %p2, [memory], 0; "
        "@!%p2 bra again; bar.sync 0; last:", "a hang: 32 threads at a barrier"),
    ("no barrier there", "mbarrier.try_wait.parity.shared.b64 %p2, [memory], 0;", "no barrier has been initialised"),
    ("a warp in part", WORDS + "setp.lt.u32 %p1, %r0, 5; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r4];",
        "part of a warp runs what all its lanes must"),
    ("for ever", "again: bra.uni again;", "a hang"),
    ("unknown", "sin.approx.f32 %f4, %f1; vadd.s32.s32.s32 %r9, %r1, %r2;", "vadd is not emulated"),
    ("unknown modifier", "add.sat.s32 %r9, %r1, %r2;", "saturation is not emulated"),
    ("part of the threads", "bar.sync 1, 32;", "a barrier of part of the threads is not emulated"),
    ("a cluster", "mov.u32 %r9, %cluster_ctaid.x;", "cluster is not emulated"),
    ("a cluster's memory", "mapa.shared::cluster.u32 %r9, %r4, 1;", "cluster is not emulated"),
    ("tensor memory", "tcgen05.wait::ld.sync.aligned;", "tensor memory is not emulated"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "what"), [row[1:] for row in RAISED], ids=[row[0] for row in RAISED])
def test_what_no_gpu_would_run_raises(body: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx_emulator.machine.MOST_BLOCKS_EXECUTED", 1000)
    with pytest.raises(PtxError, match=what):
        probe(body)


CLEAN = [
    ("a barrier", WORDS + "st.shared.b32 [%r5], %r0; bar.sync 0; ld.shared.b32 %r9, [%r6]; bar.sync 0; "
        "st.shared.b32 [%r5], %r9;"),
    ("bytes of one word", BYTES + "cvt.u16.u32 %rs1, %r0; st.shared.b8 [%r5], %rs1; ld.shared.u8 %rs2, [%r5];"),
    ("one value by all", WORDS + "st.shared.b32 [%r4], 7; bar.sync 0; ld.shared.b32 %r9, [%r4];"),
    ("a copy, waited for", WORDS + "cp.async.ca.shared.global [%r5], [%rd0], 4; cp.async.commit_group; "
        "cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r9, [%r6];"),
    ("some have ended", WORDS + "setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;"),
]  # fmt: skip


@pytest.mark.parametrize("body", [row[1] for row in CLEAN], ids=[row[0] for row in CLEAN])
def test_what_is_right_is_not_held_against_it(body: str) -> None:
    assert not probe(body)[1]


def test_a_byte_store_of_one_warp_beside_another() -> None:
    """Words that two warps share by bytes: one has the even ones."""
    at = "mov.b32 %r4, memory; and.b32 %r7, %r0, 31; shr.u32 %r8, %r0, 5; mad.lo.u32 %r5, %r7, 2, %r8; "
    assert not probe(at + "add.u32 %r5, %r5, %r4; cvt.u16.u32 %rs1, %r0; st.shared.b8 [%r5], %rs1;")[1]


def test_tensor_maps_that_the_driver_refuses() -> None:
    rows = np.zeros((8, 24), np.uint16)
    TensorMap(rows, (8, 16), 1)
    for elements, box, swizzle, reason in (
        (rows[:, 1:], (8, 16), 1, "its address"),
        (np.zeros((8, 20), np.uint16), (8, 16), 1, "bytes apart"),
        (rows, (512, 16), 1, "at most 256"),
        (rows, (8, 4), 0, "a row of its box must be a multiple"),
        (rows, (8, 32), 1, "wide as its swizzle"),
    ):
        with pytest.raises(PtxError, match=f"a tensor map that the driver refuses: .*{reason}"):
            TensorMap(elements, box, swizzle)


# ---------------------------------------------------------------------------------------- faults, in the forward's code


def without(pattern: str, n: int = 0, by: str = "") -> Callable[[str], str]:
    """The forward's PTX with the n-th match of a pattern replaced; the same text of all other kernels."""

    def change(ptx: str) -> str:
        if ".entry linear_logps_fwd_kernel" not in ptx:
            return ptx
        found = list(re.finditer(pattern, ptx))[n]
        return ptx[: found.start()] + found.expand(by) + ptx[found.end() :]

    return change


def forward(name: str, late: bool, change: Callable[[str], str] | None, architecture: str = "sm_90") -> Findings:
    case = BY_NAME[name]
    inputs = make_inputs(case)
    with emulated(architecture, late, change=change) as emulation:
        found = linear_logps_forward(inputs.head, inputs.targets, case.options, True)
    result = found._asdict() | {"lse": found.lse.float()}
    check_budget({name: x.detach() for name, x in result.items()}, inputs, case.options)
    return emulation.findings


OF_TENSORS, OF_POINTERS = "ragged_bf16", "unaligned_bf16"
PLANTED = [
    # Triton 3.7: before a stage is loaded again, and of a reduction over warps. Others number their barriers otherwise.
    ("barrier", OF_TENSORS, (r"bar\.sync\s+0;", 13), "another warp"),
    ("barrier of a reduction", OF_TENSORS, (r"bar\.sync\s+0;", 16), "another warp"),
    ("wait for a copy", OF_TENSORS, (r"mbarrier\.try_wait\.\S+ (\w+), [^;]*;", 0, r"setp.eq.u32 \1, 0, 0;"),
        "a wait is missing|more arrivals than the barrier counts"),
    ("a stage too soon", OF_TENSORS, (r"wgmma\.wait_group\.sync\.aligned 1;", 0, "wgmma.wait_group.sync.aligned 3;"),
        "write over what a product under way still reads"),
    ("group of products", OF_TENSORS, (r"wgmma\.commit_group\.sync\.aligned;", 0),
        "write over what a product under way still reads"),
    ("bytes of a copy", OF_TENSORS, (r"(expect_tx\S* _, \[%r\d+\]), 49152;", 0, r"\1, 49153;"), "a hang"),
    ("proxy fence", OF_POINTERS, (r"fence\.proxy\.async[^;]*;", 0), "no proxy fence between"),
]  # fmt: skip


# In both extremes of time: here in turn, to save time.
@pytest.mark.parametrize(
    ("name", "fault", "what", "late"),
    [(*row[1:], i % 2 == 0) for i, row in enumerate(PLANTED)],
    ids=[row[0] for row in PLANTED],
)
def test_a_planted_fault_is_found(name: str, fault: tuple[Any, ...], what: str, late: bool) -> None:
    pattern, n, *by = fault
    tries = 5 if pattern.startswith("bar") else 1  # some barriers have another beside them that does the same
    for k in range(n, n + tries):
        try:
            findings = forward(name, late, without(pattern, k, *by))
        except (PtxError, AssertionError) as error:
            # A result that is wrong is found too, after the reason has been.
            assert isinstance(error, AssertionError) or re.search(what, str(error)), error
            return
        if any(re.search(what, finding) for finding in findings):
            return
    raise AssertionError(findings)


def test_sums_that_are_read_before_they_are_there() -> None:
    """The last wait of a product: it is the result that shows it."""
    fault = (r"wgmma\.wait_group\.sync\.aligned 0;", 0, "wgmma.wait_group.sync.aligned 1;")
    with pytest.raises(AssertionError, match=r"exceeds the budget|differs"):
        forward(OF_TENSORS, False, without(*fault))


def test_a_copy_of_the_older_kind_that_is_not_waited_for() -> None:
    pattern = r"cp\.async\.wait_group\s+0x\w+|cp\.async\.wait_group\s+\d+"
    case = BY_NAME["column_bf16"]
    inputs = make_inputs(case)
    with emulated("sm_80", change=lambda ptx: re.sub(pattern, "cp.async.wait_group 9", ptx)) as emulation:
        linear_logps_forward(inputs.head, inputs.targets, case.options, True)
    assert any("a wait is missing" in finding for finding in emulation.findings), emulation.findings


def test_more_shared_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHARED_LIMIT, "sm_90", 100_000)
    with pytest.raises(PtxError, match=r"linear_logps_fwd_kernel asks for 1.* bytes .*; sm_90 has 100000"):
        forward(OF_TENSORS, True, None)
