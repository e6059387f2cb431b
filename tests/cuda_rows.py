# SPDX-License-Identifier: Apache-2.0
"""row_sum, row_grad and row_lse run in the PTX interpreter: arguments as the C++ glue has them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cuda_batch
from cuda_batch import Batch
from cuda_plan import Launch
from ptx_interpreter import Struct, Uninitialised, launch

Array = NDArray[Any]
TERMS = ["none", "linear", "square", "hinge", "squared_hinge", "softplus", "exp", "squared_sigmoid"]
LOGITS = ["none", "affine", "circle"]


@dataclass(frozen=True)
class Terms:
    """The function of a pair: z = scale d + offset, a term or a logit of it, and bounds."""

    positive: str = "hinge"
    negative: str = "hinge"
    scale: Any = ((1.0,), (-1.0,))
    """[2, 1] or [2, rows of the query]"""
    offset: Any = ((-0.5,), (3.0,))
    bound: Any = None
    """[2, rows of the query]"""
    shape: float = 0.0
    type: Any = np.float32
    """Of the numbers: the accumulate type."""

    @classmethod
    def of_margins(cls, formula: str, margins: tuple[float, float]) -> "Terms":
        """A formula of what violates the margins of positives and of negatives."""
        return cls(formula, formula, offset=((-margins[0],), (margins[1],)))

    @property
    def names(self) -> tuple[str, str]:
        return self.positive, self.negative

    def array(self, name: str) -> Array:
        """Scale or offset."""
        return np.ascontiguousarray(getattr(self, name), self.type)

    @property
    def symmetric(self) -> bool:
        """Whether both rows of a pair see the same."""
        uniform = self.array("scale").shape[1] == 1 and self.array("offset").shape[1] == 1
        return uniform and self.bound is None

    def parameter(self, name: str) -> Struct:
        """The structure RowParameter."""
        array = self.array(name)
        stride = np.int64(array.shape[1])
        each = np.int64(array.shape[1] > 1)
        return Struct([array, stride, each, [self.type(0)] * 2])

    def role(
        self, on: bool, rows: int, weight: Array | None = None, lse: Array | None = None
    ) -> Struct:
        """The structure PairRole."""
        bound = None if self.bound is None else np.ascontiguousarray(self.bound, self.type)
        numbers = [self.parameter("scale"), self.parameter("offset")]
        return Struct([np.bool_(on), np.int64(rows), *numbers, bound, weight, lse])

    def without_bound(self) -> "Terms":
        """For a role that is off: whose arrays are not of its size."""
        return replace(self, bound=None)

    def form(self, *, logits: bool) -> Struct:
        """The structure PairForm."""
        names = LOGITS if logits else TERMS
        terms = [np.int32(names.index(name)) for name in self.names]
        circle = [np.bool_(name == "circle") for name in self.names]
        return Struct([terms, circle, self.type(self.shape)])


def _unwritten(shape: Any, dtype: Any) -> Uninitialised:
    return cuda_batch.Uninitialised(np.empty(shape, dtype))


def _launch(
    batch: Batch, source: str, kernel: str, args: list[Any], chosen: Launch, seed: int
) -> None:
    assert chosen.fits
    module = cuda_batch.kernels(source, batch.arch, batch.defines)
    launch(
        module.find(kernel),
        [Struct(args)],
        grid=(chosen.grid_x, chosen.grid_y),
        block=chosen.threads,
        smem_bytes=chosen.smem,
        seed=seed,
    )


def _plan(batch: Batch, *, grad: bool) -> Launch:
    return cuda_batch.plan().fm_plan_row_sum(
        batch.planes, batch.n, batch.d, int(grad), batch.limits
    )


def row_sum(batch: Batch, terms: Terms, *, grad: bool = True, seed: int = 0) -> dict[str, Array]:
    """Sums of the query rows, and the gradient [2, n, d] of their totals in those rows."""
    chosen = _plan(batch, grad=grad)
    n = batch.n
    result = {
        "sums": _unwritten((2, n), np.float32),
        "counts": _unwritten((4, n), np.int64),
        "slopes": _unwritten((4, n), np.float32),
        "grad": _unwritten((2, n, batch.d), np.float32) if grad else None,
    }
    args = [
        batch.problem(),
        terms.form(logits=False),
        terms.role(True, n),
        terms.role(grad and batch.alone, n),
        np.bool_(terms.symmetric),
        np.bool_(False),
        np.bool_(chosen.resident),
        *batch.bad_members(),
        *result.values(),
        None,
    ]
    kernel = f"row_sum_kernelILi{batch.planes}ELNS0_7SumPartE{int(grad)}E"
    _launch(batch, "row_sum", kernel, args, chosen, seed)
    return {name: buffer.array for name, buffer in result.items() if buffer is not None}


def row_grad(
    batch: Batch,
    terms: Terms,
    *,
    own: dict[str, Array] | None = None,
    other: dict[str, Array] | None = None,
    logits: bool = False,
    separate: bool = False,
    terms_of_refs: bool = False,
    seed: int = 0,
) -> Array:
    """Gradient of a weighted sum in the query rows.

    ``own`` and ``other``: weight and lse [2, rows] of the roles of query rows and references in the
    objective; None: not in it. A gradient of the op's references has the sides of the batch
    exchanged, and ``terms_of_refs`` where the terms have numbers for each row of the other side.
    """
    chosen = _plan(batch, grad=True)
    shape = (2, batch.n, batch.d) if separate else (batch.n, batch.d)
    dtype = np.float32 if separate else batch.query.rows.dtype
    grad = _unwritten(shape, dtype)
    of_own = terms.without_bound() if terms_of_refs else terms
    of_other = terms if terms_of_refs or batch.alone else terms.without_bound()
    args = [
        batch.problem(),
        terms.form(logits=logits),
        of_own.role(own is not None, batch.n, **(own or {})),
        of_other.role(other is not None, batch.m, **(other or {})),
        np.bool_(terms.symmetric),
        np.bool_(logits),
        np.bool_(chosen.resident),
        *batch.bad_members(),
        *[None] * 3,
        grad if separate else None,
        None if separate else grad,
    ]
    _launch(batch, "row_grad", f"row_grad_kernelILi{batch.planes}E", args, chosen, seed)
    return grad.array


def row_lse(batch: Batch, terms: Terms, *, seed: int = 0) -> dict[str, Array]:
    """Log-sum-exps of the query rows."""
    chosen = _plan(batch, grad=False)
    n = batch.n
    result = {
        "lse": _unwritten((2, n), np.float32),
        "mean": _unwritten((2, n), np.float32),
        "counts": _unwritten((2, n), np.int64),
    }
    args = [
        batch.problem(),
        terms.form(logits=True),
        terms.role(True, n),
        np.bool_(chosen.resident),
        *batch.bad_members(),
        *result.values(),
    ]
    _launch(batch, "row_lse", f"row_lse_kernelILi{batch.planes}E", args, chosen, seed)
    return {name: buffer.array for name, buffer in result.items()}
