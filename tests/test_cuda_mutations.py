# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in the tile engine: the interpreter and the comparison with float64 see each.

Each is compiled from a changed copy of the sources, with one distance, one term and one dtype.
Where one check would miss a bug that another sees, the bug names the other.
"""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuda_batch
import cuda_plan
from cuda_batch import Batch
from cuda_mutants import MUTANTS as TILE_MUTANTS
from cuda_mutants import Mutant
from cuda_plan import A100
from cuda_reference import check_hardest, check_triplets, lowest_hardest, problem, swapped, unit
from cuda_row_mutants import ROW_MUTANTS
from cuda_row_reference import check_row_grad, check_row_lse, check_row_sum
from cuda_rows import Terms, row_grad, row_lse, row_sum
from ptx_interpreter import Module, PtxError, Uninitialised, parse
from ptx_interpreter.compile import CSRC, ROOT, compile_ptx

MUTANTS = [*TILE_MUTANTS, *ROW_MUTANTS]
WHERE: dict[str, Any] = {"arch": "sm_80", "limits": A100}
RULE = {"margin": 0.3}


def check_owner(planes: int = 1, d: int = 70) -> None:
    # Several chunks and column tiles: more than there are stages.
    batch = problem(np.random.default_rng(0), 70, d, 4, planes=planes, lone=(5, 66), **WHERE)
    out = batch.hardest(True, triplet=RULE)
    check_hardest(batch, out, operand_eps=2.0**-10 if planes == 1 else 0)
    check_triplets(out, RULE)


def check_ties() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(-1, 2, (70, 9)).astype(np.float32)
    batch = Batch(x, rng.integers(0, 3, 70), planes=1, **WHERE)
    np.testing.assert_array_equal(batch.hardest(True)["index"], lowest_hardest(batch))


def check_poison() -> None:
    x = np.random.default_rng(2).standard_normal((70, 9)).astype(np.float32)
    x[3, 4] = np.nan
    out = Batch(x, np.arange(70) % 3, planes=1, **WHERE).hardest(True, triplet=RULE)
    assert np.isnan(out["distance"]).all() and np.isnan(out["loss"]).all()


def check_near() -> None:
    rng = np.random.default_rng(3)
    x = unit(rng.standard_normal((3, 40)))[rng.integers(0, 3, 40)]
    x = (x + 2.0**-14 * rng.standard_normal((40, 40))).astype(np.float32)
    batch = Batch(x, rng.integers(0, 3, 40), **WHERE)
    check_hardest(batch, batch.hardest(True))


def check_shared() -> None:
    batch = problem(np.random.default_rng(4), 200, 40, 3, lone=(5, 100, 199), **WHERE)
    check_hardest(batch, batch.hardest(False, triplet=RULE, blocks=4))


def check_dot() -> None:
    # The near rule, which tells an anchor from its positives elsewhere, is not for inner products.
    where = WHERE | {"distance": "dot", "lone": (5, 100, 199)}
    batch = problem(np.random.default_rng(4), 200, 9, 3, **where)
    check_hardest(batch, batch.hardest(False))


def check_close_calls() -> None:
    # To the last rows, which are columns of the first tile, all of the others are nearly as far.
    rng = np.random.default_rng(8)
    x = rng.standard_normal((150, 40))
    x[:128] = x[0] + 2e-4 * rng.standard_normal((128, 40))
    batch = Batch(np.float32(x), np.where(np.arange(150) < 128, 0, np.arange(150) % 2), **WHERE)
    check_hardest(batch, batch.hardest(False))


def check_margins(batch: Batch, margins: tuple[float, float]) -> None:
    terms = Terms.of_margins("hinge", margins)
    check_row_sum(batch, terms, row_sum(batch, terms))


def check_weights(batch: Batch, margins: tuple[float, float], weight: Any) -> None:
    # Of the references' sums.
    terms, role = Terms.of_margins("hinge", margins), {"weight": np.float32(weight)}
    check_row_grad(batch, terms, row_grad(batch, terms, other=role), other=role)


def check_sums() -> None:
    # Five chunks of features: two parts of the gradient.
    batch = problem(np.random.default_rng(5), 70, 140, 3, **WHERE)
    check_margins(batch, (0.5, 16.5))


def check_many_tiles() -> None:
    # The stages of the third tile's chunks begin again with the first.
    batch = problem(np.random.default_rng(5), 9, 140, 3, 140, **WHERE)
    check_margins(batch, (0.5, 16.5))


def check_growth() -> None:
    # Weights that are larger from one column tile to the next.
    rng = np.random.default_rng(6)
    batch = problem(rng, 40, 20, 3, 150, **WHERE)
    weight = np.repeat(2.0 ** np.array([0, 8, 16]), 64)[:150] * rng.uniform(1, 2, (2, 150))
    check_weights(batch, (0.5, 7.0), weight)


def check_near_first() -> None:
    # A tile of near pairs only, before others with small weights.
    rng = np.random.default_rng(7)
    r = np.repeat(rng.standard_normal((1, 40)), 90, 0)
    x = r[:3] + 2.0**-10 * rng.integers(-1, 2, (3, 40))
    r[64:] += 1e3 * rng.standard_normal((26, 40))
    batch = Batch(np.float32(x), np.arange(3) % 2, np.float32(r), np.arange(90) % 2, **WHERE)
    weight = np.where(np.arange(90) < 64, 1, 2.0**-14) * np.ones((2, 1))
    check_weights(batch, (0.001, 9e3), weight)
    check_margins(batch, (0.001, 9e3))


def check_small_margin() -> None:
    rng = np.random.default_rng(3)
    x = unit(rng.standard_normal((200, 40)))
    for i in range(5):
        x[160 + 8 * i] = x[32 * i] + 1e-5 * rng.standard_normal(40)
    batch = Batch(x.astype(np.float32), np.arange(200), **WHERE)
    check_margins(batch, (0.0, 2e-4))


def check_bounds() -> None:
    # Negatives have bounds beyond those of positives.
    rng = np.random.default_rng(9)
    batch = problem(rng, 70, 20, 3, **WHERE)
    bound = np.stack([rng.uniform(2, 4, 70), rng.uniform(5, 8, 70)])
    terms = Terms(scale=((1.0,), (-1.0,)), offset=((-3.0,), (6.5,)), bound=bound)
    check_row_sum(batch, terms, row_sum(batch, terms))


def check_bounds_alone() -> None:
    # Of separate references: in a self-batch a pair has two bounds, and no tile is skipped.
    rng = np.random.default_rng(16)
    x, r = (rng.standard_normal((n, 20)).astype(np.float32) for n in (70, 40))
    batch = Batch(x, np.arange(70), r, np.arange(40) + 70, **WHERE)
    terms = Terms("none", "none", bound=np.stack([np.zeros(70), rng.uniform(5, 8, 70)]))
    check_row_sum(batch, terms, row_sum(batch, terms))


def check_limits() -> None:
    # A thread's first row alone keeps pairs, and its other row is far from all.
    x = np.random.default_rng(17).standard_normal((110, 20)).astype(np.float32)
    x[8] *= 50
    bound = np.zeros((2, 70))
    bound[1, 0] = 8
    batch = Batch(x[:70].copy(), np.arange(70), x[70:].copy(), np.arange(40) + 70, **WHERE)
    terms = Terms(bound=bound)
    check_row_sum(batch, terms, row_sum(batch, terms))


def check_rising() -> None:
    batch = problem(np.random.default_rng(10), 40, 20, 0, **WHERE)
    terms = Terms(scale=((1.0,), (1.0,)), offset=((-6.0,), (-3.0,)))
    check_row_sum(batch, terms, row_sum(batch, terms))


def check_skipped() -> None:
    x = np.eye(8)[np.arange(140) // 30] + 0.01 * np.random.default_rng(11).standard_normal((140, 8))
    batch = Batch(np.float32(x), np.arange(140), **WHERE)
    terms = Terms(offset=((-0.5,), (0.3,)))
    check_row_sum(batch, terms, row_sum(batch, terms))


def check_by_row() -> None:
    # Also of near pairs, of which the rows see different terms.
    rng = np.random.default_rng(12)
    x = rng.standard_normal((70, 40)).astype(np.float32)
    x[35:45] = x[:10] * np.float32(1 + 2.0**-12)
    batch = Batch(x, rng.integers(0, 3, 70), **WHERE)
    scale, offset = rng.uniform(0.5, 2, (2, 70)), rng.uniform(-6, 6, (2, 70))
    scale[1] *= -1
    offset[1] += 12
    terms = Terms(scale=scale, offset=offset)
    check_row_sum(batch, terms, row_sum(batch, terms))
    role = {"weight": np.float32(rng.standard_normal((2, 70)))}
    grad = row_grad(batch, terms, own=role, other=role)
    check_row_grad(batch, terms, grad, own=role, other=role)


def check_rules() -> None:
    rng = np.random.default_rng(13)
    labels = rng.integers(0, 3, (70, 2))
    batch = Batch(np.float32(rng.standard_normal((70, 20))), labels, rule="group:sd", **WHERE)
    terms = Terms(offset=((-3.0,), (7.0,)))
    check_row_sum(batch, terms, row_sum(batch, terms))


def check_lse() -> None:
    # Maxima that grow from tile to tile.
    rng = np.random.default_rng(14)
    r = rng.standard_normal((150, 20)) * (1 + np.arange(150) // 64)[:, None]
    x = rng.standard_normal((20, 20))
    batch = Batch(np.float32(x), np.arange(20) % 2, np.float32(r), np.arange(150) % 2, **WHERE)
    terms = Terms("affine", "circle", ((3.0,), (0.5,)), ((0.5,), (-1.0,)), shape=0.5)
    out = row_lse(batch, terms)
    check_row_lse(batch, terms, out)
    refs = row_lse(swapped(batch), terms)
    roles = {
        "own": {"weight": np.ones((2, 20), np.float32), "lse": out["lse"]},
        "other": {"weight": np.ones((2, 150), np.float32), "lse": refs["lse"]},
    }
    grad = row_grad(batch, terms, logits=True, **roles)
    check_row_grad(batch, terms, grad, logits=True, **roles)


def check_lse_near() -> None:
    rng = np.random.default_rng(15)
    x = rng.standard_normal((50, 40)).astype(np.float32)
    x[25:] = x[:25] * np.float32(1 + 2.0**-12)
    batch = Batch(x, np.arange(50) % 5, **WHERE)
    terms = Terms("affine", "affine", ((-30.0,), (-30.0,)), ((0.0,), (0.0,)))
    check_row_lse(batch, terms, row_lse(batch, terms))


# Each check with the instantiation that it runs.
CHECKS: dict[str, tuple[Callable[[], None], int, str, str]] = {
    "owner": (check_owner, 1, "Part::kOwner", "Euclidean"),
    "one_chunk": (functools.partial(check_owner, d=20), 1, "Part::kOwner", "Euclidean"),
    "ties": (check_ties, 1, "Part::kOwner", "Euclidean"),
    "poison": (check_poison, 1, "Part::kOwner", "Euclidean"),
    "near": (check_near, 2, "Part::kOwner", "Euclidean"),
    "dot": (check_dot, 2, "Part::kSymmetric", "Dot"),
    "shared": (check_shared, 2, "Part::kSymmetric", "Euclidean"),
    "close_calls": (check_close_calls, 2, "Part::kSymmetric", "Euclidean"),
    **{
        name: (check, 2, "SumPart::kSumsAndGrad", "Euclidean")
        for name, check in {
            "sums": check_sums,
            "many_tiles": check_many_tiles,
            "growth": check_growth,
            "near_first": check_near_first,
            "small_margin": check_small_margin,
            "bounds": check_bounds,
            "bounds_alone": check_bounds_alone,
            "limits": check_limits,
            "rising": check_rising,
            "skipped": check_skipped,
            "by_row": check_by_row,
            "rules": check_rules,
            "lse": check_lse,
            "lse_near": check_lse_near,
        }.items()
    },
}

# Less to compile: one distance, hinge, float32 rows, and the kernels without launchers.
CUTS = [
    (
        "cuda/exact.cuh",
        "    case Distance::kEuclidean:",
        "      return f(Dot{});",
        "    default:\n      return f(FLASHMETRIC_DISTANCE{});",
    ),
    (
        "include/flashmetric/formula.h",
        "    case Term::kLinear:",
        "      return f(SquaredSigmoid{});",
        "    default:\n      return f(Hinge{});",
    ),
    ("include/flashmetric/cuda_kernels.h", "    case Scalar::kHalf:", "(__nv_bfloat16{});\n", ""),
    ("cuda/prepare.cu", "cudaError_t prepare(", "\n}\n", ""),
    ("cuda/hardest.cu", "template <int kPlanes>\nvoid (*kernel_for(", "FINISH", ""),
    ("cuda/row_sum.cu", "cudaError_t row_sum(", "FINISH", ""),
    ("cuda/row_grad.cu", "cudaError_t row_grad(", "FINISH", ""),
    ("cuda/row_lse.cu", "cudaError_t row_lse(", "FINISH", ""),
]
_ROWS = ("row_term.cuh", "pair_tile.cuh", "label_rule.h", "exact.cuh", "tile.cuh", "layout.h")
_SUMS = ("row_sum.cuh", "row_finish.cuh", "back_product.cuh", *_ROWS)
SOURCES = {
    "prepare": ("prepare.cu", "exact.cuh", "layout.h", "plan.h"),
    "hardest": ("hardest.cu", "hardest.cuh", "finish.cuh", "exact.cuh", "tile.cuh", "layout.h"),
    "row_sum": ("row_sum.cu", *_SUMS),
    "row_grad": ("row_grad.cu", *_SUMS),
    "row_lse": ("row_lse.cu", "row_lse.cuh", *_ROWS),
}
END = "\n}  // namespace flashmetric::cuda\n"


def replace(file: Path, old: str, new: str) -> None:
    """Replace the one place where a text occurs."""
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name} has {text.count(old)} times: {old}"
    file.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources with less to compile."""
    root = tmp_path_factory.mktemp("plain") / "csrc"
    for folder in ("include", "cuda"):
        shutil.copytree(CSRC / folder, root / folder, ignore=shutil.ignore_patterns("*.cpp"))
    for name, begin, end, new in CUTS:
        text = (root / name).read_text()
        assert text.count(begin) == 1, f"{name}: {begin}"
        first = text.index(begin)
        last = len(text) - len(END) if end == "FINISH" else text.index(end, first) + len(end)
        (root / name).write_text(text[:first] + new + text[last:])
    kind = "FLASHMETRIC_PLANES, FLASHMETRIC_KIND"
    for name, chosen, arguments in [
        ("hardest", f"hardest_kernel<{kind}>", "HardestArgs"),
        ("row_sum", f"row_sum_kernel<{kind}>", "RowSumArgs"),
        ("row_grad", "row_grad_kernel<FLASHMETRIC_PLANES>", "RowSumArgs"),
        ("row_lse", "row_lse_kernel<FLASHMETRIC_PLANES>", "RowLseArgs"),
    ]:
        file = root / "cuda" / f"{name}.cu"
        text = file.read_text().replace("namespace {", "").replace("}  // namespace\n", "")
        instance = f"template __global__ void {chosen}(const {arguments});\n"
        text = text[: -len(END)] + instance + END
        file.write_text(text)
    replace(root / "cuda" / "prepare.cu", "namespace {", "")
    replace(root / "cuda" / "prepare.cu", "}  // namespace\n", "")
    return root


def compiled(root: Path, source: str, planes: int, kind: str, distance: str) -> Module:
    """One kernel of a copy of the sources."""
    defines = [f"FLASHMETRIC_DISTANCE={distance}"]
    if source != "prepare":
        defines += [f"FLASHMETRIC_PLANES={planes}", f"FLASHMETRIC_KIND={kind}"]
    return parse(compile_ptx(root / "cuda" / f"{source}.cu", defines=defines, root=root))


compiled_once = functools.cache(compiled)


class Filled(Uninitialised):
    """What a kernel does not write is no leftover that happens to be right."""

    def __init__(self, array: np.ndarray) -> None:
        """Fill the array with junk."""
        super().__init__(array)
        array.reshape(-1).view(np.uint8)[:] = 0xFB


def run(
    monkeypatch: pytest.MonkeyPatch, check: str, root: Path, plain: Path, touched: set[str]
) -> None:
    """Run a check with the kernels of ``root`` where they differ from those of ``plain``."""
    function, *instance = CHECKS[check]

    def kernels(source: str, arch: str, defines: tuple[str, ...] = ()) -> Module:
        if touched & set(SOURCES[source]):
            return compiled(root, source, *instance)
        return compiled_once(plain, source, *instance)

    monkeypatch.setattr(cuda_batch, "kernels", kernels)
    monkeypatch.setattr(cuda_batch, "Uninitialised", Filled)
    function()


@pytest.mark.parametrize("check", CHECKS)
def test_checks_pass_without_a_bug(
    check: str, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, check, plain, plain, set())


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_bug_is_seen(
    mutant: Mutant, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "csrc"
    touched = {file for file, _, _ in mutant.edits}
    of_host = touched == {"plan.h"}
    shutil.copytree(CSRC if of_host else plain, root)
    for file, old, new in mutant.edits:
        replace(root / "cuda" / file, old, new)
    if of_host:
        # The plans change; the kernels stay as they are.
        (tmp_path / "tests").mkdir()
        shutil.copy(ROOT / "tests" / "cuda_plan_shim.cpp", tmp_path / "tests")
        monkeypatch.setattr(cuda_plan, "ROOT", tmp_path)
        other = cuda_plan.plan.__wrapped__()
        monkeypatch.setattr(cuda_batch, "plan", lambda: other)
        touched = set()
    with pytest.raises((PtxError, AssertionError)):
        run(monkeypatch, mutant.check, root, plain, touched)


def test_names_of_bugs_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
