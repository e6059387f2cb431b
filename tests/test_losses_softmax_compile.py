# SPDX-License-Identifier: Apache-2.0
"""The softmax losses under torch.compile, with the options that need no counting."""

import pytest
import torch

import flashmetric
from helpers import make_rows

# The compiler itself instantiates autograd functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

LABELS = torch.tensor([2, 0, 0, 1, 2, 0, 5, 1, 2])


@pytest.mark.parametrize(
    "loss",
    [
        flashmetric.NPairsLoss(l2=0.1),
        flashmetric.NTXentLoss(),
        flashmetric.InfoNCELoss(),
        flashmetric.SupConLoss(),
        flashmetric.CircleLoss(),
        flashmetric.AngularLoss(max_positives=3),
        flashmetric.AngularLoss(max_positives=3, n_pairs_lambda=2.0),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_compiles_to_one_graph(loss):
    torch.compiler.reset()
    x = make_rows(9, 4, torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, value = loss(x, LABELS), compiled(x, LABELS)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(expected, x))
    torch.compiler.reset()


@pytest.mark.parametrize(
    "loss",
    [
        flashmetric.NPairsLoss(l2=0.1),
        flashmetric.InfoNCELoss(),
        flashmetric.ContrastiveImageTextLoss(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_towers_compile_to_one_graph(loss):
    torch.compiler.reset()
    x, r = make_rows(9, 4, torch.float32), make_rows(9, 4, torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, value = loss(x, ref_emb=r), compiled(x, ref_emb=r)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, (x, r)), torch.autograd.grad(expected, (x, r))
    )
    torch.compiler.reset()
