# SPDX-License-Identifier: Apache-2.0
"""Instructions of a whole warp, atomic operations and copies, against plain numpy."""

from typing import Any

import numpy as np
import pytest

from ptx_interpreter import PtxError, Uninitialised, launch, parse
from ptx_interpreter.single import execute, kernel_text

LANE = np.arange(32)
MASKS = [("idx", lambda lane, b: b), ("bfly", lambda lane, b: lane ^ b)]
REGISTERS = ".reg .b32 %r<32>; .reg .f32 %f<16>; .reg .b64 %rd<8>; .reg .pred %p<4>;\n"


def run(
    body: str, arrays: list[Any], *, threads: int = 32, smem_bytes: int = 0, **options: Any
) -> None:
    """Runs a body in which %r0 is the thread and %rd<i> the pointers."""
    pointers = "".join(f"ld.param.u64 %rd{i}, [p{i}];\n" for i in range(len(arrays)))
    shared = ".extern .shared .align 16 .b8 smem[];\n"
    text = kernel_text(REGISTERS + "mov.u32 %r0, %tid.x;\n" + pointers + body, len(arrays))
    kernel = parse(text.replace(".visible", shared + ".visible"))["k"]
    launch(kernel, arrays, 1, threads, smem_bytes=smem_bytes, **options)


# ---- exchange between lanes ----------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(width: int) -> None:
    x = np.arange(64, dtype=np.uint32) * 3
    lane = np.arange(64) % 32
    first = np.arange(64) - lane
    segment = lane // width * width
    for b in range(0, width, 3):
        up = np.where(lane - b >= segment, lane - b, lane)
        down = np.where(lane + b < segment + width, lane + b, lane)
        for kind, c, source in (
            ("up", (32 - width) << 8, up),
            ("down", (32 - width) << 8 | 31, down),
            ("idx", (32 - width) << 8 | 31, segment + b),
            (
                "bfly",
                (32 - width) << 8 | 31,
                np.where((lane ^ b) < segment + width, lane ^ b, lane),
            ),
        ):
            got = execute(f"shfl.sync.{kind}.b32", "b32", [("b32", x)], [str(b), str(c), "-1"])
            assert (got == x[first + source]).all(), (kind, b)


def test_shuffle_tells_whether_the_lane_is_in_range() -> None:
    out = np.zeros(32, np.uint32)
    run(
        "shfl.sync.down.b32 %r1|%p0, %r0, 5, 31, -1;\nselp.u32 %r2, 1, 0, %p0;\n"
        "mad.wide.u32 %rd0, %r0, 4, %rd0;\nst.global.u32 [%rd0], %r2;",
        [out],
    )
    assert (out == (LANE + 5 < 32)).all()


def test_votes_and_reductions() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 64, dtype=np.uint32)
    p = rng.integers(0, 2, 64)
    p[:32] = 1
    warps = p.reshape(2, 32)
    operand = [("pred", p)]
    ballot = [sum(int(v) << i for i, v in enumerate(w)) for w in warps]
    assert (execute("vote.sync.ballot.b32", "b32", operand, ["-1"]) == np.repeat(ballot, 32)).all()
    for kind, function in {
        "any": np.any,
        "all": np.all,
        "uni": lambda w: np.all(w) | ~np.any(w),
    }.items():
        got = execute(f"vote.sync.{kind}.pred", "pred", operand, ["-1"])
        assert (got == np.repeat([function(w == 1) for w in warps], 32)).all()
    for name, t, function in [
        ("add", "u32", np.add),
        ("min", "u32", np.minimum),
        ("max", "s32", np.maximum),
        ("and", "b32", np.bitwise_and),
        ("or", "b32", np.bitwise_or),
        ("xor", "b32", np.bitwise_xor),
    ]:
        values = x.view(np.int32) if t == "s32" else x
        got = execute(f"redux.sync.{name}.{t}", t, [(t, values)], ["-1"])
        expected = function.reduce(values.reshape(2, 32), axis=1, dtype=values.dtype)
        assert (got == np.repeat(expected, 32)).all()


@pytest.mark.parametrize("t", ["b32", "b64"])
def test_match(t: str) -> None:
    x = np.random.default_rng(0).integers(0, 4, 32).astype(np.uint64 if t == "b64" else np.uint32)
    expected = [sum(1 << i for i in range(32) if x[i] == v) for v in x]
    assert execute(f"match.any.sync.{t}", "b32", [(t, x)], ["-1"]).tolist() == expected
    assert not execute(f"match.all.sync.{t}", "b32", [(t, x)], ["-1"]).any()
    assert (execute(f"match.all.sync.{t}", "b32", [(t, x * 0)], ["-1"]) == 2**32 - 1).all()


def test_instructions_of_some_lanes() -> None:
    out = np.zeros(32, np.uint32)
    run(
        "setp.lt.u32 %p0, %r0, 8;\nmov.b32 %r1, 0;\n@%p0 bra $low;\nbra $end;\n"
        "$low: redux.sync.add.u32 %r1, %r0, 0xff;\nvote.sync.ballot.b32 %r2, %p0, 0xff;\n"
        "shl.b32 %r2, %r2, 8;\nadd.u32 %r1, %r1, %r2;\nactivemask.b32 %r3;\n"
        "shl.b32 %r3, %r3, 16;\nadd.u32 %r1, %r1, %r3;\n$end:\n"
        "mad.wide.u32 %rd0, %r0, 4, %rd0;\nst.global.u32 [%rd0], %r1;",
        [out],
    )
    assert (out == np.where(LANE < 8, 28 + (0xFF << 8) + (0xFF << 16), 0)).all()


# ---- matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count: int, transposed: bool) -> None:
    x = np.random.default_rng(0).integers(0, 2**16, (count, 8, 8)).astype(np.uint16)
    words = x.reshape(-1, 8).view(np.uint32).copy()  # rows of four words
    rows = np.zeros((32, 4), np.uint32)
    rows[: 8 * count] = words
    out = np.zeros((32, count), np.uint32)
    results = ", ".join(f"%r{10 + i}" for i in range(count))
    stores = "".join(f"st.global.b32 [%rd1+{4 * i}], %r{10 + i};\n" for i in range(count))
    run(
        "mad.wide.u32 %rd0, %r0, 16, %rd0;\nld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0];\n"
        "mov.u32 %r5, smem;\nmad.lo.u32 %r5, %r0, 16, %r5;\n"
        "st.shared.v4.u32 [%r5], {%r1, %r2, %r3, %r4};\nbar.sync 0;\n"
        f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16 "
        f"{{{results}}}, [%r5];\nmad.wide.u32 %rd1, %r0, {4 * count}, %rd1;\n{stores}",
        [rows, out],
        smem_bytes=512,
    )
    matrices = x.transpose(0, 2, 1) if transposed else x
    got = out.view(np.uint16).reshape(8, 4, count, 2).transpose(2, 0, 1, 3).reshape(count, 8, 8)
    assert (got == matrices).all()


def to_bits(values: Any, kind: str) -> Any:
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float32).view(np.uint32)


@pytest.mark.parametrize(
    ("depth", "kind"), [(8, "tf32"), (8, "f16"), (16, "f16"), (8, "bf16"), (16, "bf16")]
)
def test_mma(depth: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    a, b, c = (
        rng.integers(-8, 9, s).astype(np.float64) for s in ((16, depth), (depth, 8), (16, 8))
    )
    g, q = LANE // 4, LANE % 4
    each = 1 if kind == "tf32" else 2
    a_bits, b_bits = to_bits(a, kind), to_bits(b, kind)

    def register(pick: Any) -> Any:
        parts = [pick(e).astype(np.uint32) << np.uint32(16 * e) for e in range(each)]
        return sum(parts[1:], parts[0])

    halves = depth // (4 * each)
    a_registers = [
        register(lambda e, r=r, h=h: a_bits[g + 8 * r, 4 * each * h + each * q + e])
        for h in range(halves)
        for r in range(2)
    ]
    b_registers = [
        register(lambda e, h=h: b_bits[4 * each * h + each * q + e, g]) for h in range(halves)
    ]
    places = [(g, 2 * q), (g, 2 * q + 1), (g + 8, 2 * q), (g + 8, 2 * q + 1)]
    values = np.stack([*a_registers, *b_registers, *(c[p].astype("f4").view("u4") for p in places)])
    out = np.zeros((4, 32), np.float32)
    count = len(values)
    loads = "".join(f"ld.global.b32 %r{i + 1}, [%rd0+{128 * i}];\n" for i in range(count - 4))
    loads += "".join(f"ld.global.f32 %f{i}, [%rd0+{128 * (count - 4 + i)}];\n" for i in range(4))
    na, nb = len(a_registers), len(b_registers)
    names = [f"%r{i + 1}" for i in range(na + nb)]
    run(
        f"mad.wide.u32 %rd0, %r0, 4, %rd0;\nmad.wide.u32 %rd1, %r0, 4, %rd1;\n{loads}"
        f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{%f0, %f1, %f2, %f3}}, "
        f"{{{', '.join(names[:na])}}}, {{{', '.join(names[na:])}}}, {{%f0, %f1, %f2, %f3}};\n"
        + "".join(f"st.global.f32 [%rd1+{128 * i}], %f{i};\n" for i in range(4)),
        [values.astype(np.uint32), out],
    )
    expected = a @ b + c
    for register_values, place in zip(out, places, strict=True):
        assert (register_values == expected[place]).all()


# ---- atomic operations ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    ("name", "t", "dtype"),
    [
        (n, t, d)
        for n in ("min", "max")
        for t, d in (("u32", np.uint32), ("s32", np.int32), ("u64", np.uint64), ("s64", np.int64))
    ]
    + [
        ("add", t, d)
        for t, d in (
            ("u32", np.uint32),
            ("s32", np.int32),
            ("u64", np.uint64),
            ("f32", np.float32),
            ("f64", np.float64),
        )
    ]
    + [
        (n, t, d) for n in ("and", "or", "xor") for t, d in (("b32", np.uint32), ("b64", np.uint64))
    ],
)
def test_atomics(name: str, t: str, dtype: Any, seed: int) -> None:
    """All threads at one of 8 words: the sums, and the values before each operation."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**31, 64).astype(dtype)
    if np.dtype(dtype).kind in "iu":
        x = rng.integers(0, 2**63, 64, dtype=np.uint64).astype(dtype) * dtype(3)
    start = rng.integers(0, 100, 8).astype(dtype)
    functions = {
        "min": np.minimum,
        "max": np.maximum,
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    expected = start.copy()
    functions[name].at(expected, np.arange(64) % 8, x)
    size = np.dtype(dtype).itemsize
    value = "%rd7" if size == 8 else "%r9"
    old = "%rd6" if size == 8 else "%r8"
    for space in ("global", "shared"):
        cells, before, out = start.copy(), np.zeros(64, dtype), np.zeros(8, dtype)
        body = (
            f"mad.wide.u32 %rd1, %r0, {size}, %rd1;\nld.global.b{8 * size} {value}, [%rd1];\n"
            f"mad.wide.u32 %rd2, %r0, {size}, %rd2;\nand.b32 %r1, %r0, 7;\n"
            f"mad.wide.u32 %rd0, %r1, {size}, %rd0;\nmov.u32 %r2, smem;\n"
            f"mad.lo.u32 %r2, %r1, {size}, %r2;\nsetp.lt.u32 %p0, %r0, 8;\n"
        )
        if space == "shared":
            word = "%rd5" if size == 8 else "%r5"
            body += (
                f"@%p0 ld.global.b{8 * size} {word}, [%rd0];\n"
                f"@%p0 st.shared.b{8 * size} [%r2], {word};\nbar.sync 0;\n"
                f"atom.shared.{name}.{t} {old}, [%r2], {value};\nbar.sync 0;\n"
                f"@%p0 ld.shared.b{8 * size} {word}, [%r2];\n"
                f"@%p0 st.global.b{8 * size} [%rd0], {word};\n"
            )
        else:
            body += f"atom.global.{name}.{t} {old}, [%rd0], {value};\n"
        body += f"st.global.b{8 * size} [%rd2], {old};"
        run(body, [cells, x, before], threads=64, smem_bytes=64, seed=seed)
        if np.dtype(dtype).kind == "f":
            np.testing.assert_allclose(cells, expected, rtol=1e-6)
        else:
            assert (cells == expected).all()
        if seed == 0:
            for word in range(8):
                at = start[word]
                for thread in range(word, 64, 8):
                    assert before[thread] == at
                    at = functions[name](at, x[thread])
        if space == "global":
            cells = start.copy()
            run(
                body.replace(f"atom.global.{name}.{t} {old},", f"red.global.{name}.{t}").replace(
                    f"st.global.b{8 * size} [%rd2], {old};", ""
                ),
                [cells, x, out],
                threads=64,
                smem_bytes=64,
                seed=seed,
            )
            assert np.allclose(cells, expected)


def test_exchange_and_compare() -> None:
    cells, out = np.zeros(2, np.uint64), np.zeros(32, np.uint64)
    run(
        "mad.wide.u32 %rd1, %r0, 8, %rd1;\ncvt.u64.u32 %rd2, %r0;\nadd.u64 %rd2, %rd2, 1;\n"
        "atom.global.exch.b64 %rd3, [%rd0], %rd2;\n"
        "atom.global.cas.b64 %rd4, [%rd0+8], 0, %rd2;\nst.global.u64 [%rd1], %rd3;",
        [cells, out],
    )
    assert cells.tolist() == [32, 1] and out.tolist() == list(range(32))


def test_atomic_on_memory_that_nobody_has_written() -> None:
    with pytest.raises(PtxError, match="global memory read that nobody has written"):
        run("red.global.add.u32 [%rd0], 1;", [Uninitialised(np.zeros(1, np.uint32))])


# ---- asynchronous copies -------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [None, 0, 2, 4, 6, 12, 16])
@pytest.mark.parametrize("form", ["cg.shared.global", "ca.shared.global.L2::128B"])
def test_copies_of_some_bytes(taken: int | None, form: str) -> None:
    x = np.random.default_rng(0).integers(1, 256, (32, 16)).astype(np.uint8)
    out = np.zeros_like(x)
    size = "" if taken is None else f", {taken}"
    run(
        "mov.u32 %r1, smem;\nmad.lo.u32 %r1, %r0, 16, %r1;\nmad.wide.u32 %rd0, %r0, 16, %rd0;\n"
        f"mad.wide.u32 %rd1, %r0, 16, %rd1;\ncp.async.{form} [%r1], [%rd0], 16{size};\n"
        "cp.async.wait_all;\nld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%r1];\n"
        "st.global.v4.u32 [%rd1], {%r2, %r3, %r4, %r5};",
        [x, out],
        smem_bytes=512,
    )
    taken = 16 if taken is None else taken
    assert (out[:, :taken] == x[:, :taken]).all() and (out[:, taken:] == 0).all()


def test_copy_beyond_the_end_of_what_it_takes() -> None:
    body = (
        "mov.u32 %r1, smem;\nmad.lo.u32 %r1, %r0, 16, %r1;\nmad.wide.u32 %rd0, %r0, 16, %rd0;\n"
        "cp.async.cg.shared.global [%r1], [%rd0], 16, {};\ncp.async.wait_all;\n"
    )
    x = np.zeros(32 * 16 - 8, np.uint8)
    run(body.format(8), [x], smem_bytes=512)
    with pytest.raises(PtxError, match="out of bounds: 4 bytes at offset 504"):
        run(body.format(12), [x], smem_bytes=512)


def test_groups_of_each_thread_are_its_own() -> None:
    """Lanes that commit another number of groups wait for others."""
    x, out = np.arange(64, dtype=np.uint32), np.zeros(32, np.uint32)
    body = (
        "mov.u32 %r1, smem;\nmad.lo.u32 %r1, %r0, 8, %r1;\nmad.wide.u32 %rd0, %r0, 8, %rd0;\n"
        "mad.wide.u32 %rd1, %r0, 4, %rd1;\nsetp.lt.u32 %p0, %r0, 16;\n"
        "cp.async.ca.shared.global [%r1], [%rd0], 4;\ncp.async.commit_group;\n"
        "@%p0 cp.async.ca.shared.global [%r1+4], [%rd0+4], 4;\n@%p0 cp.async.commit_group;\n"
        "cp.async.wait_group {};\nld.shared.u32 %r2, [%r1];\nst.global.u32 [%rd1], %r2;\n"
        "cp.async.wait_all;\n"
    )
    with pytest.raises(PtxError, match=r"read before its cp.async.*threads 16, 17"):
        run(body.format(1), [x, out], smem_bytes=256)
    run(body.format(0), [x, out], smem_bytes=256)
    assert (out == x[::2]).all()


def test_vectors_and_narrow_accesses() -> None:
    x, out = np.arange(128, dtype=np.int16) * 300 - 10000, np.zeros((32, 4), np.int32)
    run(
        "mad.wide.u32 %rd0, %r0, 8, %rd0;\nmad.wide.u32 %rd1, %r0, 16, %rd1;\n"
        "ld.global.L1::no_allocate.L2::128B.v4.s16 {%r1, %r2, %r3, %r4}, [%rd0];\n"
        "st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};",
        [x, out],
    )
    assert (out.ravel() == x).all()
    octets = np.zeros(32, np.uint8)
    run("mad.wide.u32 %rd0, %r0, 1, %rd0;\nst.global.u8 [%rd0], %r0;", [octets])
    assert (octets == LANE).all()


def test_tables_of_the_module() -> None:
    tables = ".global .align 16 .b8 first[8] = {9};\n"
    tables += ".global .align 16 .b8 numbers[16] = {1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 1};\n"
    body = REGISTERS + "ld.param.u64 %rd0, [p0];\nmov.u64 %rd1, numbers;\n"
    body += "ld.global.nc.u32 %r0, [%rd1+12];\nst.global.u32 [%rd0], %r0;"

    def load(body: str) -> int:
        out = np.zeros(1, np.uint32)
        text = kernel_text(body, 1).replace(".visible", tables + ".visible")
        launch(parse(text)["k"], [out], 1, 32)
        return int(out[0])

    body = body.replace(
        "ld.global", "mov.u32 %r1, %tid.x;\nsetp.eq.u32 %p0, %r1, 0;\n@%p0 ld.global"
    )
    body = body.replace("st.global", "@%p0 st.global")
    assert load(body) == 4 + 256
    with pytest.raises(PtxError, match="out of bounds"):
        load(body.replace("+12", "+16"))
