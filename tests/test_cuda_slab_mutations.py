# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in row_sum and row_lse of the slab engine: the interpreter or the loops see each."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pair_kernels
import test_cuda_slab_rows as slab_rows
from cuda_mutants import Mutant
from cuda_row_mutants import SLAB_ROW_MUTANTS
from cuda_rows import Terms
from ptx_interpreter import Module, PtxError, parse
from ptx_interpreter.compile import CSRC, compile_ptx
from slab_kernels import Operand
from slab_row_kernels import RowSlabs, make_row_slabs
from test_cuda_slab_rows import bounds, by_row, check_lse, check_sum

SOURCES = ("slab_distance.cu", "slab_row_sum.cu", "slab_row_lse.cu", "slab_row_grad.cu")


def seen_by_sums() -> None:
    # Bounds, numbers that differ from row to row, and more references than threads.
    rng = np.random.default_rng(0)
    slabs = make_row_slabs(rng, "euclidean", 7, None, 4, 4)
    terms = Terms("squared_hinge", "softplus", **by_row(rng, 7), bound=bounds(rng, slabs))
    check_sum(slabs, terms)
    check_sum(make_row_slabs(rng, "euclidean", 2, 300, 2, 2), Terms("hinge", "hinge"))


def seen_by_rules() -> None:
    slabs = make_row_slabs(np.random.default_rng(1), "sqeuclidean", 7, None, 3, 7, rule="group:sd")
    check_sum(slabs, Terms("linear", "softplus"))


def seen_by_log_sum_exps() -> None:
    # Logits too large for an exponential, the largest late in the row; queries without a positive.
    r = np.concatenate((np.linspace(0, 1, 90), [3.0, 4.0]))[:, None]
    x = Operand(np.array([[-0.5], [0.25]]), np.array([0, 7]), "float32")
    slabs = RowSlabs(x, Operand(r, np.arange(92) % 3, "float32"), "equal", "euclidean", "both", 2)
    check_lse(slabs, Terms("circle", "affine", ((3.0,), (30.0,)), ((0.5,), (0.0,)), shape=1.0))
    # And one of which no share is all of the sum.
    check_lse(slabs, Terms("affine", "affine", ((0.5,), (-0.5,)), ((0.0,), (0.0,))))
    slab_rows.test_logits_beyond_all_numbers()


def seen_by_near_pairs() -> None:
    rows = 1 + np.random.default_rng(2).integers(-8, 9, (6, 40)) / 1024
    rows[:4] /= np.linalg.norm(rows[:4], axis=1, keepdims=True)
    rows[4] = 0
    rows[5] = np.eye(40)[0]
    operand = Operand(rows, np.arange(6) % 2, "float64")
    slabs = RowSlabs(operand, operand, "equal", "cosine", "both", 6)
    check_sum(slabs, Terms("linear", "exp", ((3.0,), (-2.0,))))


def seen_by_direct_distances() -> None:
    slabs = make_row_slabs(np.random.default_rng(3), "cityblock", 5, None, 3, 5)
    check_sum(slabs, Terms("linear", "linear"))


CHECKS: dict[str, Callable[[], None]] = {
    "sum": seen_by_sums,
    "rules": seen_by_rules,
    "lse": seen_by_log_sum_exps,
    "near": seen_by_near_pairs,
    "direct": seen_by_direct_distances,
    "poison": lambda: slab_rows.test_rows_that_are_not_finite(np.nan),
}


@pytest.mark.parametrize("check", CHECKS)
def test_checks_pass_without_a_bug(check: str) -> None:
    CHECKS[check]()


@pytest.mark.parametrize("bug", SLAB_ROW_MUTANTS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_bug_is_seen(bug: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "csrc"
    for folder in ("include", "cuda"):
        shutil.copytree(CSRC / folder, root / folder, ignore=shutil.ignore_patterns("*.cpp"))
    for name, old, new in bug.edits:
        text = (root / "cuda" / name).read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} times: {old}"
        (root / "cuda" / name).write_text(text.replace(old, new))
    touched = {name for name, _, _ in bug.edits}
    sound, made = pair_kernels.module, {}

    def module(source: str) -> Module:
        # Only these have been changed, or include what has been.
        if source not in SOURCES or not (touched - {*SOURCES} or source in touched):
            return sound(source)
        if source not in made:
            text = compile_ptx(root / "cuda" / source, root=root).read_text()
            made[source] = parse(pair_kernels.interpretable(text))
        return made[source]

    monkeypatch.setattr(pair_kernels, "module", module)
    with pytest.raises((PtxError, AssertionError)):
        CHECKS[bug.check]()


def test_names_of_bugs_are_unique() -> None:
    assert len({bug.name for bug in SLAB_ROW_MUTANTS}) == len(SLAB_ROW_MUTANTS)
