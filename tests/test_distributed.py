# SPDX-License-Identifier: Apache-2.0
"""Losses over the rows of several processes against those of one, on the CPU by Gloo."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import distributed_cases
from flashmetric import ContrastiveImageTextLoss, NPairsLoss, SupConLoss
from flashmetric.distributed import gather_loss, ring_loss

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs Gloo")


def run(case: Callable[..., Any], world: int, folder: Path, form: str) -> None:
    mp.spawn(case, (world, str(folder / "store"), form), nprocs=world)


@pytest.mark.parametrize("form", distributed_cases.FORMS)
@pytest.mark.parametrize("world", [2, 4])
def test_every_loss(world: int, form: str, tmp_path: Path) -> None:
    run(distributed_cases.every_loss, world, tmp_path, form)


@pytest.mark.parametrize("form", distributed_cases.FORMS)
def test_data_parallel(form: str, tmp_path: Path) -> None:
    run(distributed_cases.data_parallel, 2, tmp_path, form)


@pytest.mark.parametrize("form", distributed_cases.FORMS)
def test_two_towers(form: str, tmp_path: Path) -> None:
    run(distributed_cases.towers, 2, tmp_path, form)


@pytest.mark.parametrize("form", distributed_cases.FORMS)
def test_a_failing_rank_fails_everywhere(form: str, tmp_path: Path) -> None:
    run(distributed_cases.errors, 2, tmp_path, form)


def test_what_cannot_be_done() -> None:
    with pytest.raises(TypeError, match="loss must be a loss of flashmetric, got Linear"):
        gather_loss(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ContrastiveImageTextLoss looks both ways"):
        gather_loss(ContrastiveImageTextLoss())
    with pytest.raises(ValueError, match="NPairsLoss does not: use gather_loss"):
        ring_loss(NPairsLoss())
    with pytest.raises(ValueError, match="reduction must not be 'none'"):
        gather_loss(SupConLoss(reduction="none"))(torch.zeros(2, 2), torch.zeros(2))
