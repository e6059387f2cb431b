# SPDX-License-Identifier: Apache-2.0
"""PyTorch implementations under names of their own.

Native code calls ``flashmetric::_plain_<op>`` for what it does not serve itself: on CUDA float64
rows and direct distances of row sums and log-sum-exps. The op itself would end in the same code.
"""

from flashmetric._library import library
from flashmetric.ops.row_lse import (
    row_lse,
    row_lse_backward,
    row_lse_backward_fallback,
    row_lse_fallback,
)
from flashmetric.ops.row_sum import (
    row_sum,
    row_sum_backward,
    row_sum_backward_fallback,
    row_sum_fallback,
)

for _op, _fallback in (
    (row_sum, row_sum_fallback),
    (row_sum_backward, row_sum_backward_fallback),
    (row_lse, row_lse_fallback),
    (row_lse_backward, row_lse_backward_fallback),
):
    _name = f"_plain_{_op._schema.name.removeprefix('flashmetric::')}"
    library.define(str(_op._schema).replace(_op._schema.name, _name, 1))
    library.impl(_name, _fallback, "CompositeExplicitAutograd")
