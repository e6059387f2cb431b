# SPDX-License-Identifier: Apache-2.0
"""Losses over the rows of several processes against those of one, on the CPU by Gloo."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distributed_cases
import distributed_failures
from flashmetric import (
    NPairsLoss,
    PairLoss,
    SoftTripletLoss,
    SupConLoss,
    TripletMarginLoss,
    miners,
)
from flashmetric.distributed import gather_loss, ring_loss
from ranks import Ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs Gloo")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """Processes of two or four ranks, which all tests share unless one of them fails."""
    groups: dict[int, Ranks] = {}

    def start(world: int) -> Ranks:
        if world not in groups or groups[world].closed:
            groups[world] = Ranks(world, tmp_path_factory.mktemp("ranks"))
        return groups[world]

    yield start
    for ranks in groups.values():
        if not ranks.closed:
            ranks.close()


@pytest.mark.parametrize("form", distributed_cases.FORMS)
@pytest.mark.parametrize("world", [2, 4])
def test_every_loss(world: int, form: str, started: Callable[[int], Ranks]) -> None:
    started(world).run(distributed_cases.every_loss, form)


@pytest.mark.parametrize("form", distributed_cases.FORMS)
@pytest.mark.parametrize(
    "case",
    [
        distributed_cases.data_parallel,
        distributed_cases.sharded,
        distributed_cases.towers,
        distributed_cases.default_backend,
        distributed_failures.errors,
        distributed_failures.out_of_memory,
        distributed_failures.pickled,
    ],
    ids=lambda case: case.__name__,
)
def test_two_ranks(case: Callable[..., None], form: str, started: Callable[[int], Ranks]) -> None:
    started(2).run(case, form)


def test_choice_among_anchors(started: Callable[[int], Ranks]) -> None:
    started(2).run(distributed_failures.choice_among_anchors)


def test_mined(started: Callable[[int], Ranks]) -> None:
    started(2).run(distributed_cases.mined, "gather")


@pytest.mark.parametrize("form", distributed_cases.FORMS)
def test_a_process_that_is_killed(form: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    given = str(tmp_path / "store"), form
    processes = [
        context.Process(target=distributed_failures.ends, args=(rank, *given)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]


def test_compiled(started: Callable[[int], Ranks]) -> None:
    started(2).run(distributed_cases.compiled)


class Own(SupConLoss):
    pass


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (torch.nn.Linear(2, 2), "loss must be a loss of flashmetric itself, got torch.nn.mod.*Lin"),
        (Own(), "got test_distributed.Own"),
        (PairLoss(lambda pairs: pairs.total()), "other than PairLoss"),
        (SoftTripletLoss(3, 5), "SoftTripletLoss has centres of its own"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_losses_that_are_no_sum_over_anchors_of_all_ranks(loss, match) -> None:
    for form in (gather_loss, ring_loss):
        with pytest.raises(TypeError, match=match):
            form(loss)


def test_what_cannot_be_done() -> None:
    with pytest.raises(TypeError, match="miner must be a miner of flashmetric, got str"):
        gather_loss(SupConLoss(), miner="hard")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="miner must be None for NPairsLoss"):
        gather_loss(NPairsLoss(), miner=miners.BatchHardMiner())
    with pytest.raises(ValueError, match="NPairsLoss.* does not: use gather_loss"):
        ring_loss(NPairsLoss())
    with pytest.raises(ValueError, match="swap=True.* does not: use gather_loss"):
        ring_loss(TripletMarginLoss(swap=True))
    with pytest.raises(ValueError, match="reduction must not be 'none'"):
        gather_loss(SupConLoss(reduction="none"))
