# SPDX-License-Identifier: Apache-2.0
"""The arithmetic under the CUDA kernels: layouts, keys, prescale, order of tiles, launch plans."""

import ctypes
import itertools

import numpy as np
import pytest

from cuda_plan import A100, ADA, H100, TURING, DeviceLimits, plan

BANK_GROUP, GROUPS = 16, 8
LIMITS = {"sm_75": TURING, "sm_80": A100, "sm_89": ADA, "sm_90": H100}


def float_bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def bits_float(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


@pytest.mark.parametrize(
    ("offset", "row_bytes"), [("fm_piece_offset", 64), ("fm_weight_offset", 128)]
)
def test_swizzle_is_a_bijection_without_bank_conflicts(offset: str, row_bytes: int) -> None:
    function = getattr(plan(), offset)
    pieces = row_bytes // BANK_GROUP
    places = {function(row, piece) for row in range(128) for piece in range(pieces)}
    assert places == set(range(0, 128 * row_bytes, BANK_GROUP))
    for first, piece in itertools.product(range(0, 128, 8), range(pieces)):
        # ldmatrix reads the same piece of eight successive rows at a time.
        groups = {function(first + r, piece) // BANK_GROUP % GROUPS for r in range(8)}
        assert len(groups) == GROUPS


def test_fragment_maps_are_those_of_the_instruction() -> None:
    out = (ctypes.c_int32 * 14)()
    accumulators = set()
    for lane in range(32):
        plan().fm_fragment(lane, out)
        group, quarter = lane // 4, lane % 4
        assert list(out[6:10]) == [group, group, group + 8, group + 8]
        assert list(out[10:14]) == [2 * quarter, 2 * quarter + 1] * 2
        accumulators |= set(zip(out[6:10], out[10:14], strict=True))
        # Matrix lane / 8 of ldmatrix.x4; a: rows first, b: pieces first, transposed b: rows first.
        matrix, row = lane // 8, lane % 8
        assert (out[0], out[1]) == (row + matrix % 2 * 8, matrix // 2)
        assert (out[2], out[3]) == (row + matrix // 2 * 8, matrix % 2)
        assert (out[4], out[5]) == (row + matrix % 2 * 8, matrix // 2)
    assert len(accumulators) == 16 * 8


def test_keys_order_like_values_and_then_indices() -> None:
    values = [-np.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1.0, 1.0000001, 3e38, np.inf]
    indices = [0, 1, 2**31 - 1]
    keys = [plan().fm_make_key(float_bits(v), i) for v in values for i in indices]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    assert keys[-1] < 2**64 - 1
    assert [plan().fm_key_index(k) for k in keys[:3]] == indices
    assert plan().fm_key_index(2**64 - 1) == -1


def test_prescale_brings_the_largest_element_to_the_top_of_half_precision() -> None:
    for exponent in range(-149, 128):
        for mantissa in (1.0, 1.5, 1.9999999):
            value = np.float32(mantissa) * np.float64(2.0) ** exponent
            value = np.float32(min(value, float(np.finfo(np.float32).max)))
            power = plan().fm_prescale_exponent(float_bits(value))
            assert -126 <= power <= 126 and -126 <= -power
            scaled = float(value) * 2.0**power
            assert scaled < 2**15
            if exponent >= -112:
                assert scaled >= 2**14
            assert bits_float(plan().fm_power_of_two_bits(power)) == 2.0**power
            inverse = plan().fm_inverse_power_bits(plan().fm_power_of_two_bits(power))
            assert bits_float(inverse) == 2.0**-power
    assert plan().fm_prescale_exponent(0) == 126


def segments(order: tuple[int, int, int, int], part: int, parts: int) -> list[list[int]]:
    room = 4096
    buffer = (ctypes.c_int64 * (3 * room))()
    count = plan().fm_segments(*order, part, parts, buffer, room)
    assert count < room
    return [list(buffer[3 * t : 3 * t + 3]) for t in range(count)]


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("symmetric", [0, 1])
@pytest.mark.parametrize("ratio", [1, 2])
def test_every_tile_is_visited_once(rows: int, symmetric: int, ratio: int) -> None:
    columns = rows * ratio if symmetric else 5
    order = (rows, columns, ratio, symmetric)
    expected = {
        (row, column)
        for row in range(rows)
        for column in range(row * ratio if symmetric else 0, columns)
    }
    assert plan().fm_tile_count(*order) == len(expected)
    for parts in (1, 2, 3, 5, len(expected)):
        visited: list[tuple[int, int]] = []
        sizes = []
        for part in range(parts):
            own = [
                (row, column)
                for row, begin, end in segments(order, part, parts)
                for column in range(begin, end)
            ]
            sizes.append(len(own))
            visited += own
        assert sorted(visited) == sorted(expected)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("planes", [1, 2])
def test_plans_fit_their_device(arch: str, planes: int) -> None:
    limits: DeviceLimits = LIMITS[arch]
    for d in (0, 1, 32, 64, 100, 128, 256, 512, 1024, 4096):
        for n, m in ((1, 1), (512, 512), (2048, 8192), (2049, 2049), (2**20, 2**20)):
            for alone in (0, 1):
                mining = plan().fm_plan_hardest(planes, n, m, d, alone, limits)
                assert mining.fits and 0 < mining.smem <= limits.smem_per_block
                assert mining.threads == 128 and 0 < mining.grid_x <= 2**31 - 1
                assert bool(mining.owner) == (n <= plan().fm_owner_rows() and m <= 8192)
                if not mining.owner:
                    assert mining.grid_x <= 2 * limits.sms
                    assert bool(mining.symmetric) == bool(alone)
            for grad in (0, 1):
                sums = plan().fm_plan_pair_sum(planes, n, d, grad, limits)
                assert sums.fits and 0 < sums.smem <= limits.smem_per_block
                assert sums.grid_x == -(-n // 64) and 1 <= sums.grid_y < 65536
                assert grad or sums.grid_y == 1


def test_resident_rows_leave_room_for_a_second_block() -> None:
    for planes, d in itertools.product((1, 2), (32, 64, 128, 256, 512)):
        mining = plan().fm_plan_hardest(planes, 2**15, 2**15, d, 1, H100)
        assert 2 * (mining.smem + 1024) <= H100.smem_per_sm
        assert mining.grid_x == 2 * H100.sms
    # On an H100: one plane of 256 features, two of 128.
    assert plan().fm_plan_hardest(1, 2**15, 2**15, 256, 1, H100).resident
    assert plan().fm_plan_hardest(2, 2**15, 2**15, 128, 1, H100).resident
    assert not plan().fm_plan_hardest(2, 2**15, 2**15, 256, 1, H100).resident


def test_too_many_tiles_are_refused() -> None:
    assert plan().fm_plan_hardest(1, 2**22, 2**22, 64, 1, H100).fits
    assert not plan().fm_plan_hardest(1, 2**23, 2**23, 64, 0, H100).fits


def test_row_grids_are_bounded() -> None:
    assert [plan().fm_plan_rows(n) for n in (0, 1, 4, 5, 4096, 2**20)] == [1, 1, 1, 2, 1024, 1024]
