# SPDX-License-Identifier: Apache-2.0
"""The PTX interpreter's checks: wrong kernels are reported as what they are, right ones pass."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptx_interpreter import Kernel, Module, PtxError, Struct, Uninitialised, launch, parse
from ptx_interpreter.compile import compile_ptx
from ptx_interpreter.single import HEAD, kernel_text

KERNELS = Path(__file__).parent / "ptx_interpreter" / "kernels"

NO_BARRIER = "race: shared memory read after thread .* has written it"
BAD = {
    "bad_no_barrier": NO_BARRIER,
    "bad_overwrite": "race: shared memory written after thread .* has read it",
    "bad_no_warp_barrier": NO_BARRIER,
    "bad_warp_barrier_for_block": NO_BARRIER,
    "bad_same_word": "race: shared memory written by two threads at once",
    "bad_shared_atomics": "race: shared memory read after thread .* has updated atomically it",
    "bad_unwritten_shared": r"shared memory read before it was written.*threads 5\)",
    "bad_shared_bounds": "shared access out of bounds: 4 bytes at offset 256 of 256",
    "bad_shared_alignment": "misaligned shared access of 8 bytes",
    "bad_divergent_barrier": "divergent barrier",
    "bad_left_before_barrier": "barrier after other threads have left",
    "bad_shuffle_outside_mask": "reads a lane that takes no part",
    "bad_not_in_mask": "a lane executes it that is not in the mask",
    "bad_read_of_lane_that_left": "reads a lane that takes no part",
    "bad_plus_equals": "race: array 0 written after another block .* has read it",
    "bad_atomic_and_plain": "race: array 0 read after .* has updated atomically it",
    "bad_global_no_barrier": "race: array 0 read after thread .* has written it",
    "bad_global_overwrite": "race: array 0 written after .* has read it",
    "bad_global_bounds": "global access out of bounds: 4 bytes at offset 4096 of array 0",
    "bad_global_before_start": "global access out of bounds: 4 bytes at offset -4 of array 0",
    "bad_global_alignment": "misaligned global access of 16 bytes",
    "bad_cache_of_written": "array 0 read by ld.global.nc, but written in this launch",
    "bad_trap": "the kernel trapped",
    "bad_division": r"division by zero.*threads 0\)",
}
BAD_COPIES = {
    "bad_copy_no_wait": "race: shared memory read before its cp.async has been waited for",
    "bad_copy_lax_wait": "race: shared memory read before its cp.async has been waited for",
    "bad_copy_no_barrier": NO_BARRIER,
    "bad_copy_overwritten": "race: shared memory written while a cp.async into it is in flight",
    "bad_copy_never_waited": "the kernel ends with a cp.async in flight",
}


@functools.cache
def checks() -> Module:
    return parse(compile_ptx(KERNELS / "checks.cu", arch="sm_80"))


def integers() -> Any:
    return np.zeros(1024, np.int32)


@pytest.mark.parametrize("name", BAD)
def test_wrong_kernel_is_reported(name: str) -> None:
    smem = 256 if name == "bad_shared_bounds" else 0
    blocks = 4 if name in ("bad_plus_equals", "bad_global_overwrite") else 1
    with pytest.raises(PtxError, match=BAD[name]) as caught:
        launch(checks()[name], [integers()], blocks, 64, smem_bytes=smem)
    assert "checks.cu:" in str(caught.value) or "intrinsics" in str(caught.value)


@pytest.mark.parametrize("name", BAD_COPIES)
def test_wrong_copy_is_reported(name: str) -> None:
    with pytest.raises(PtxError, match=BAD_COPIES[name]):
        launch(checks()[name], [integers(), integers()], 1, 64)


def test_all_wrong_kernels_are_listed() -> None:
    elsewhere = {"bad_shuffle_diverged", "bad_null"}
    listed = {*BAD, *BAD_COPIES, *elsewhere}
    assert {name for name in checks() if name.startswith("bad_")} == listed


def test_shuffle_in_a_divergent_branch() -> None:
    o = integers()
    o[3] = 1
    with pytest.raises(PtxError, match="not all lanes that the instruction needs come here"):
        launch(checks()["bad_shuffle_diverged"], [o], 1, 64)


def test_null_pointer() -> None:
    with pytest.raises(PtxError, match="global access at 0x0, which is in no array"):
        launch(checks()["bad_null"], [integers(), None], 1, 64)


@pytest.mark.parametrize("blocks", [1, 5, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_right_kernels(blocks: int, seed: int) -> None:
    def run(name: str, dtype: Any = np.int32) -> Any:
        o = np.zeros(64 * blocks + 1024, dtype)
        launch(checks()[name], [o], blocks, 64, seed=seed)
        return o

    thread = np.arange(64)
    each = np.tile(thread, blocks)
    n = 64 * blocks
    assert (run("ok_barrier")[:n] == 2).all()
    assert (run("ok_warp_barrier")[:n] == 2).all()
    sums = [int(thread[:32].sum()), int(thread[32:].sum())]
    assert (run("ok_warp_tree")[: 2 * blocks] == np.tile(sums, blocks)).all()
    assert (run("ok_halves_of_a_word", np.int16)[:n] == each ^ 1).all()
    assert (run("ok_shared_atomics")[:n] == thread.sum()).all()
    assert (run("ok_barrier_reductions")[:n] == 22 + 100).all()
    assert run("ok_atomic_add")[0] == n
    lane = thread % 32
    v = np.where(lane < 8, thread + (thread ^ 3), thread - (thread ^ 5))
    assert (run("ok_groups")[:n] == np.tile(v + v[thread // 32 * 32 + 7], blocks)).all()


@pytest.mark.parametrize("blocks", [1, 5])
def test_right_kernels_on_global_memory(blocks: int) -> None:
    n = 64 * blocks
    o = integers()
    launch(checks()["ok_global_after_barrier"], [o], blocks, 64)
    assert (o[512 : 512 + n] == np.tile(np.arange(64) ^ 33, blocks)).all()
    x = np.arange(128, dtype=np.int32)
    launch(checks()["ok_copy"], [x, o], blocks, 64)
    assert (o[:n] == np.tile(x[:64] + 64 + (x[:64] ^ 32), blocks)).all()
    launch(checks()["ok_generic"], [o], blocks, 64)
    odd = np.arange(n) % 2 == 1
    assert (o[:n] == np.where(odd, 7, 8)).all() and (o[512 : 512 + n] == np.where(odd, 6, 5)).all()


def test_last_block() -> None:
    kernel = checks()["last_block"]
    with pytest.raises(PtxError, match="race: array 0 read after another block"):
        launch(kernel, [integers(), 1], 4, 64)
    o = integers()
    with pytest.raises(PtxError, match="after another block has written it without a fence"):
        launch(kernel, [o, 0], 4, 64, shared_buffers=[o])
    o = integers()
    launch(kernel, [o, 1], 40, 64, shared_buffers=[o])
    assert o[100] == 40


def test_uninitialised_memory_is_remembered_over_launches() -> None:
    kernel = checks()["copy"]
    x, y, out = integers(), Uninitialised(integers()), integers()
    x[:] = np.arange(1024)
    launch(kernel, [x, y, 100], 2, 64)
    launch(kernel, [y, out, 100], 2, 64)
    assert (out[:100] == np.arange(100)).all()
    with pytest.raises(PtxError, match=r"that nobody has written \(array 0, offset 400\)"):
        launch(kernel, [y, out, 101], 2, 64)


def test_struct_by_value() -> None:
    x, out = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    sizes = (np.int64(10), np.int64(50))
    for twice in (False, True):
        members = [x, np.bool_(twice), out, sizes, np.float32(0.5)]
        launch(checks()["by_value"], [Struct(members)], 1, 64)
        expected = x[10:60] * (1 if twice else 0.5)
        assert (out[:50] == expected).all() and (out[50:] == 0).all()
    with pytest.raises(PtxError, match="has 48 bytes aligned to 8, its argument 40"):
        launch(checks()["by_value"], [Struct(members[:-1])], 1, 64)


def test_launch_refuses() -> None:
    o = integers()
    with pytest.raises(PtxError, match="64 threads, the kernel is bounded to 32"):
        launch(checks()["bounded"], [o], 1, 64)
    with pytest.raises(PtxError, match="sm_80 has 166912"):
        launch(checks()["bad_shared_bounds"], [o], 1, 64, smem_bytes=166913)
    with pytest.raises(PtxError, match="two array arguments overlap"):
        launch(checks()["copy"], [o[:8], o[4:12], 4], 1, 64)
    with pytest.raises(PtxError, match="2 arguments for 3 parameters"):
        launch(checks()["copy"], [o, o], 1, 64)
    with pytest.raises(PtxError, match="is an integer"):
        launch(checks()["copy"], [o, o, np.float32(3)], 1, 64)
    with pytest.raises(PtxError, match="cannot be launched"):
        launch(checks()["copy"], [o, o, 3], 1, 48)


# ---- strictness ----------------------------------------------------------------------------------

REGISTERS = (
    ".reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %rd<4>;\n"
)
UNKNOWN = [
    "frobnicate.b32 %r0, %r1;",
    "add.s32.wild %r0, %r1, %r2;",
    "add.rn.s32 %r0, %r1, %r2;",
    "add.rn.rz.f32 %f0, %f1, %f2;",
    "add.s32 %r0, %r1;",
    "add.s32 %rd0, %r1, %r2;",
    "add.s32 %r0, %h1, %r2;",
    "add.f32 %f0, %f1, 1;",
    "add.s32 %r0, %r1, 0f3F800000;",
    "add.s32 %r0, %r1, nobody;",
    "mul.s32 %r0, %r1, %r2;",
    "fma.f32 %f0, %f1, %f2, %f3;",
    "fma.lo.s32 %r0, %r1, %r2, %r3;",
    "div.f32 %f0, %f1, %f2;",
    "sin.rn.f32 %f0, %f1;",
    "max.abs.f32 %f0, %f1, %f2;",
    "cvt.f16.f32 %h0, %f1;",
    "cvt.rn.s32.f32 %r0, %f1;",
    "cvt.rni.f32.s32 %f0, %r1;",
    "cvt.rn.e4m3x2.f32 %h0, %f1, %f2;",
    "setp.lt.b32 %p0, %r1, %r2;",
    "setp.ltu.s32 %p0, %r1, %r2;",
    "setp.lt.nand.s32 %p0, %r1, %r2, %p1;",
    "mov.b32 {%h0, %h1, %h2}, %r0;",
    "mov.u32 %r0, %clock;",
    "ld.global.s32.v2 {%r0, %r1}, [%rd0];",
    "ld.global.v2.s32 %r0, [%rd0];",
    "ld.global.sticky.s32 %r0, [%rd0];",
    "ld.shared.nc.s32 %r0, [%r1];",
    "ld.global.s32 %r0, [%r1];",
    "ld.const.s32 %r0, [%rd1];",
    "ld.param.s32 %r0, [p0+8];",
    "st.global.b32 [%rd0], %h1;",
    "atom.global.add.s64 %rd0, [%rd1], %rd2;",
    "atom.global.inc.u32 %r0, [%rd1], %r2;",
    "red.global.exch.b32 [%rd1], %r2;",
    "bar.sync 1;",
    "bar.sync 0, 32;",
    "bar.arrive 0, 64;",
    "bar.warp.arrive 0;",
    "shfl.down.b32 %r0, %r1, 1, 31;",
    "shfl.sync.rotate.b32 %r0, %r1, 1, 31, -1;",
    "vote.any.pred %p0, %p1;",
    "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, "
    "{%r0, %r1, %r2, %r3}, {%r4, %r5}, {%f0, %f1, %f2, %f3};",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, "
    "{%r0, %r1}, {%r4, %r5}, {%f0, %f1, %f2, %f3};",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r0, %r1, %r2, %r3}, "
    "{%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r0, %r1, %r2, %r3};",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1}, [%r2];",
    "cp.async.cg.shared.global [%r0], [%rd0], 8;",
    "cp.async.mbarrier.arrive.shared.b64 [%r0];",
    "call (%r0), f, (%r1);",
    "brx.idx %r0, table;",
    "bra $nowhere;",
    "griddepcontrol.wait;",
    "prefetch.global.L1 [%rd0];",
    "ex2.approx.f64 %rd0, %rd1;",
]


def handwritten(line: str) -> Kernel:
    return parse(kernel_text(f"{REGISTERS}{line}", 1))["k"]


@pytest.mark.parametrize("line", UNKNOWN, ids=lambda line: line.split()[0])
def test_unknown_instruction(line: str) -> None:
    with pytest.raises(PtxError, match=r"not known:.*(?s:.)*PTX line 7"):
        launch(handwritten(line), [integers()], 1, 32)


@pytest.mark.parametrize(
    "line", ["add.s32 %r0, %r9, %r1;", "add.s32 %r0, x y, %r1;", "@%r1 bra $a;", "mov.u32 %r0, ;"]
)
def test_unreadable_instruction(line: str) -> None:
    with pytest.raises(PtxError, match=r"not known:.*PTX line 7"):
        launch(handwritten(line), [integers()], 1, 32)


def test_local_memory_is_not_allowed() -> None:
    with pytest.raises(PtxError, match="local memory is not allowed"):
        launch(handwritten(".local .align 4 .b8 depot[32];"), [integers()], 1, 32)
    with pytest.raises(PtxError, match="local memory is not allowed"):
        launch(handwritten("ld.local.u32 %r0, [%rd0];"), [integers()], 1, 32)


def test_instructions_that_are_not_reached_are_checked() -> None:
    with pytest.raises(PtxError, match="not known: frobnicate"):
        launch(handwritten("ret;\nfrobnicate %r0;"), [integers()], 1, 32)


def test_code_must_end_with_ret() -> None:
    text = f"{HEAD}.entry k()\n{{\n.reg .b32 %r<2>;\nmov.u32 %r0, %tid.x;\n}}\n"
    with pytest.raises(PtxError, match="ends without ret"):
        launch(parse(text)["k"], [], 1, 32)
