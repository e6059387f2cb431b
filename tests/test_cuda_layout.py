# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of csrc/cuda/layout.h and plan.h, compiled as it is, against its definitions."""

import ctypes
import itertools

import numpy as np
import pytest

from cuda_plan import A100, ADA, H100, TURING, DeviceLimits, plan

BANK_GROUPS = 8  # of 16 bytes: what one piece covers
DEVICES = {"sm_75": TURING, "sm_80": A100, "sm_89": ADA, "sm_90": H100}


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def floats(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint32).view(np.float32)


@pytest.mark.parametrize(
    ("offset", "rows", "pieces"), [("fm_piece_offset", 128, 4), ("fm_weight_offset", 64, 8)]
)
def test_shared_memory_has_no_bank_conflicts(offset: str, rows: int, pieces: int) -> None:
    place = np.array(
        [[getattr(plan(), offset)(row, piece) for piece in range(pieces)] for row in range(rows)]
    )
    # Each piece has a place of its own, within its row.
    assert sorted(place.ravel().tolist()) == list(range(0, rows * pieces * 16, 16))
    assert (place // (pieces * 16) == np.arange(rows)[:, None]).all()
    # ldmatrix reads a piece of eight successive rows at a time.
    groups = (place // 16 % BANK_GROUPS).reshape(-1, 8, pieces)
    assert (np.sort(groups, axis=1) == np.arange(8)[None, :, None]).all()
    # Copies of neighbouring threads: all pieces of the rows of a quarter of a warp.
    groups = (place // 16 % BANK_GROUPS).reshape(-1, 8)
    assert (np.sort(groups, axis=1) == np.arange(8)).all()
    # Rows at a distance of eight have the same order of pieces.
    assert (place[8:] - place[:-8] == 8 * pieces * 16).all()


def fragment(lane: int) -> dict[str, list[int]]:
    """What a lane reads and holds."""
    out = (ctypes.c_int32 * 14)()
    plan().fm_fragment(lane, out)
    names = ("a_row", "a_piece", "b_row", "b_piece", "bt_row", "bt_piece")
    return {name: [out[t]] for t, name in enumerate(names)} | {
        "acc_row": list(out[6:10]),
        "acc_col": list(out[10:14]),
    }


def ldmatrix(matrix: np.ndarray, rows: str, pieces: str, trans: bool = False) -> np.ndarray:
    """Registers [lane, register, 2] of ldmatrix_x4, from what the lanes hand in."""
    source = [fragment(lane) for lane in range(32)]
    out = np.empty((32, 4, 2), matrix.dtype)
    for block in range(4):
        small = np.stack(
            [
                matrix[source[lane][rows][0], source[lane][pieces][0] * 8 :][:8]
                for lane in range(8 * block, 8 * block + 8)
            ]
        )
        small = small.T if trans else small
        for lane in range(32):
            out[lane, block] = small[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
    return out


def test_fragments() -> None:
    # mma.m16n8k16 of the PTX ISA, with g = lane / 4 and q = lane % 4.
    matrix = np.arange(256).reshape(16, 16)  # [row, depth] of a; [column, depth] of two b
    a = ldmatrix(matrix, "a_row", "a_piece")
    b = ldmatrix(matrix, "b_row", "b_piece")
    bt = ldmatrix(matrix, "bt_row", "bt_piece", trans=True)  # [depth, column]
    for lane in range(32):
        g, q = lane // 4, lane % 4
        pair = np.array([0, 1])
        for register, (depth, row) in enumerate(itertools.product((0, 8), repeat=2)):
            # a0: (g, 2q), a1: (g + 8, 2q), a2: (g, 2q + 8), a3: (g + 8, 2q + 8)
            np.testing.assert_array_equal(a[lane, register], matrix[g + row, 2 * q + depth + pair])
        for register in range(4):
            # b0: (2q, g), b1: (2q + 8, g); registers 2 and 3 of the next eight columns
            column, depth = g + register // 2 * 8, 2 * q + register % 2 * 8
            np.testing.assert_array_equal(b[lane, register], matrix[column, depth + pair])
            np.testing.assert_array_equal(bt[lane, register], matrix[depth + pair, column])
        own = fragment(lane)
        assert own["acc_row"] == [g, g, g + 8, g + 8]
        assert own["acc_col"] == [2 * q, 2 * q + 1, 2 * q, 2 * q + 1]


def test_keys_are_in_the_order_of_values_and_indices() -> None:
    values = [-np.inf, -3e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1.0, 1.0000001, 3e38, np.inf]
    indices = [0, 1, 2**31 - 1]
    pairs = list(itertools.product(values, indices))
    keys = [plan().fm_make_key(bits(value), index) for value, index in pairs]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    none = 2**64 - 1
    assert max(keys) < none and plan().fm_key_index(none) == -1
    for (_, index), key in zip(pairs, keys, strict=True):
        assert plan().fm_key_index(key) == index


def test_prescale_brings_the_largest_element_near_the_top() -> None:
    exponents = np.arange(-126, 128)
    largest = np.concatenate([np.ldexp(1.0, exponents), np.ldexp(2 - 2.0**-23, exponents)])
    for value in np.float32(largest):
        exponent = plan().fm_prescale_exponent(bits(value))
        # Both the factor and what undoes it are normal numbers.
        assert -126 <= exponent <= 126 and -126 <= -exponent
        scaled = np.ldexp(np.float64(value), exponent)
        assert scaled < 2**15 and np.isfinite(np.float16(scaled))
        assert scaled >= 2**14 or exponent == 126
    # Subnormal numbers and 0 have the largest factor, infinity and NaN a finite one.
    for value in (0.0, 1e-45, 1.17e-38):
        assert plan().fm_prescale_exponent(bits(value)) == 126
    for value in (np.inf, np.nan):
        assert plan().fm_prescale_exponent(bits(value)) == -114


def test_powers_of_two() -> None:
    exponents = range(-126, 127)
    powers = floats([plan().fm_power_of_two_bits(e) for e in exponents])
    np.testing.assert_array_equal(powers, np.ldexp(np.float32(1), np.array(exponents)))
    inverses = floats([plan().fm_inverse_power_bits(bits(power)) for power in powers])
    np.testing.assert_array_equal(powers * inverses, 1)


def segments(order: tuple[int, int, int, int], part: int, parts: int) -> np.ndarray:
    """Row tile, first column tile and end of each run of a share."""
    out = np.empty((4096, 3), np.int64)
    count = plan().fm_segments(*order, part, parts, out.ctypes.data, len(out))
    assert count < len(out)
    return out[:count]


ORDERS = [
    (*tiles, ratio, 0) for tiles in [(1, 1), (1, 7), (6, 1), (5, 4), (3, 11)] for ratio in (1, 2)
] + [(rows, rows * ratio, ratio, 1) for rows in (1, 2, 3, 4, 7, 8) for ratio in (1, 2)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_tile_is_in_one_share(order: tuple[int, int, int, int]) -> None:
    rows, columns, ratio, symmetric = order
    wanted = {
        (row, column)
        for row in range(rows)
        for column in range(row * ratio if symmetric else 0, columns)
    }
    count = plan().fm_tile_count(*order)
    assert count == len(wanted)
    if symmetric:
        # Of each pair of row tiles one order, or both within the diagonal's.
        pairs = {frozenset((row, column // ratio)) for row, column in wanted}
        assert len(pairs) == rows * (rows + 1) // 2
    for parts in [*range(1, count + 3), 132]:
        found: list[tuple[int, int]] = []
        sizes = []
        for part in range(parts):
            runs = segments(order, part, parts)
            assert (runs[:, 1] < runs[:, 2]).all()
            tiles = [(row, c) for row, begin, end in runs.tolist() for c in range(begin, end)]
            found += tiles
            sizes.append(len(tiles))
            # Runs are as long as they can be: a row tile is loaded again only where it must be.
            assert len(runs) == len({row for row, _ in tiles})
        assert len(found) == count and set(found) == wanted
        assert max(sizes) - min(sizes) <= 1


def test_shares_of_many_tiles() -> None:
    for count, parts in [(2**31 - 1, 264), (10**12 + 7, 216), (5, 132), (0, 3)]:
        # One row of tiles: a share is one run of columns.
        ends = [0]
        for part in sorted({*range(min(parts, 5)), parts - 2, parts - 1}):
            runs = segments((1, max(count, 1), 1, 0), part, parts) if count else []
            size = sum(int(end - begin) for _, begin, end in runs)
            assert size in (count // parts, count // parts + 1)
            if len(runs):
                ends.append(int(runs[0][2]))
        assert ends[-1] == count


SIZES = [(d, n) for d in (0, 1, 32, 33, 64, 128, 512, 1000, 2048, 4096) for n in (1, 2048, 2**20)]


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("arch", DEVICES)
def test_plans_fit_every_device(arch: str, planes: int) -> None:
    limits: DeviceLimits = DEVICES[arch]
    for d, n in SIZES:
        launches = [
            plan().fm_plan_hardest(planes, n, m, d, int(m == n), limits) for m in (1, n, 2**20)
        ]
        launches += [plan().fm_plan_hardest_shared(planes, n, n, d, s, limits) for s in (0, 1)]
        sums = [plan().fm_plan_row_sum(planes, n, d, grad, limits) for grad in (0, 1)]
        for launch in [*launches, *sums]:
            assert launch.fits
            assert 0 < launch.smem <= limits.smem_per_block
            assert launch.threads in (128, 256) and launch.grid_x >= 1
        for launch in launches:
            tiles = launch.row_tiles, launch.col_tiles, launch.ratio, launch.symmetric
            assert launch.grid_y == 1
            if launch.owner:
                assert n <= plan().fm_owner_rows() and launch.grid_x == launch.row_tiles
            else:
                assert launch.grid_x <= min(2 * limits.sms, plan().fm_tile_count(*tiles))
        chunks = plan().fm_chunks(d)
        for launch, grad in zip(sums, (0, 1), strict=True):
            assert launch.grid_x == -(-n // 64)
            # Some blocks for each part of the gradient, all chunks in one of them.
            assert launch.grid_y == 1 if not grad else 1 <= launch.grid_y <= min(chunks, 65535)


def test_resident_rows_are_given_up_for_a_second_block() -> None:
    for limits in DEVICES.values():
        for d in (64, 512, 4096):
            launch = plan().fm_plan_hardest_shared(1, 4096, 4096, d, 1, limits)
            if launch.resident:
                assert 2 * (launch.smem + 1024) <= limits.smem_per_sm


def test_too_little_shared_memory_does_not_fit() -> None:
    tiny = DeviceLimits(75, 1, 16384, 16384)
    assert not plan().fm_plan_hardest(2, 4096, 4096, 64, 1, tiny).fits
    assert not plan().fm_plan_row_sum(2, 64, 64, 1, tiny).fits


def test_too_many_tiles_do_not_fit() -> None:
    # Kernels number tiles by int.
    assert plan().fm_plan_hardest(1, 2**22, 2**22, 64, 1, H100).fits
    assert not plan().fm_plan_hardest(1, 2**23, 2**23, 64, 0, H100).fits


def test_numbers_of_blocks_of_rows() -> None:
    blocks = [plan().fm_plan_rows(rows) for rows in (0, 1, 4, 5, 4096, 4097, 2**20)]
    assert blocks == [1, 1, 1, 2, 1024, 1024, 1024]
