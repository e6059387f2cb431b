# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_distributed.py run: every loss on parts of a batch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import flashmetric
from flashmetric.catalog import ENTRIES
from flashmetric.distributed import gather_loss, ring_loss

FORMS: dict[str, Callable[..., nn.Module]] = {"gather": gather_loss, "ring": ring_loss}
# Of these sizes are the parts; the last has no positives.
PARTS = {2: (25, 16), 4: (14, 3, 13, 11)}
WITHOUT_PAIRS = 11
NOT_ALL_ANCHORS = ("ContrastiveImageTextLoss",)
NEED_ALL_ROWS = ("NPairsLoss", "AngularLoss", "QuadrupletLoss")

MINED = {
    "batch_hard": lambda: flashmetric.TripletMarginLoss(),
    "batch_all": lambda: flashmetric.TripletMarginLoss(
        mining="batch_all", reduction="mean_nonzero"
    ),
    "semi_hard": lambda: flashmetric.TripletMarginLoss(mining="semi_hard"),
}


def losses(form: str) -> dict[str, nn.Module]:
    """Every loss over labelled batches that this form serves."""
    made = {name: make() for name, make in MINED.items()}
    for entry in ENTRIES:
        served = entry.name not in NOT_ALL_ANCHORS
        served = served and not (form == "ring" and entry.name in NEED_ALL_ROWS)
        if entry.call != "batch" or not served:
            continue
        options = dict(entry.example)
        if "features" in options:
            options["features"] = 5
        torch.manual_seed(0)
        made.setdefault(entry.name, getattr(flashmetric, entry.name)(**options))
    return made


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and a linear encoder."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(41, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (41,), generator=generator)
    labels[-WITHOUT_PAIRS:] = torch.arange(100, 100 + WITHOUT_PAIRS)
    weight = torch.rand(6, 5, generator=generator, dtype=torch.float64) / 2
    return x.to(dtype), labels, weight.to(dtype)


def part(rank: int, world: int) -> slice:
    begin = sum(PARTS[world][:rank])
    return slice(begin, begin + PARTS[world][rank])


def start(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{store}")


def every_loss(rank: int, world: int, store: str, form: str) -> None:
    """Value and gradient of the encoder against those of one process, in float64."""
    start(rank, world, store)
    x, labels, weight = data(torch.float64)
    own = part(rank, world)
    for name, loss in losses(form).items():
        loss = loss.double()
        leaf = weight.clone().requires_grad_()
        value = FORMS[form](loss, average=False)(x[own] @ leaf, labels[own])
        value.backward()
        assert leaf.grad is not None
        dist.all_reduce(leaf.grad)
        alone = weight.clone().requires_grad_()
        expected = loss(x @ alone, labels)
        expected.backward()
        for ours, theirs in ((value, expected), (leaf.grad, alone.grad)):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
    dist.destroy_process_group()


def data_parallel(rank: int, world: int, store: str, form: str) -> None:
    """A step of DistributedDataParallel in float32: the same parameters as one process has."""
    start(rank, world, store)
    x, labels, _ = data(torch.float32)
    own = part(rank, world)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    whole = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    whole.load_state_dict(model.state_dict())
    loss = flashmetric.SupConLoss()
    parallel = nn.parallel.DistributedDataParallel(model)
    value = FORMS[form](loss)(parallel(x[own]), labels[own])
    value.backward()
    expected = loss(whole(x), labels)
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0.0)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        size = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6 * size)
    dist.destroy_process_group()


def towers(rank: int, world: int, store: str, form: str) -> None:
    """Two towers, with and without labels."""
    start(rank, world, store)
    x, labels, weight = data(torch.float64)
    own = part(rank, world)
    texts = x.flip(1) @ weight
    for given in (None, labels):
        for loss in (flashmetric.InfoNCELoss(), flashmetric.SigLIPLoss()):
            of_ranks, alone = weight.clone().requires_grad_(), weight.clone().requires_grad_()
            mine = None if given is None else given[own]
            value = FORMS[form](loss.double(), average=False)(
                x[own] @ of_ranks, mine, texts[own], mine
            )
            expected = loss(x @ alone, given, ref_emb=texts, ref_labels=given)
            value.backward()
            expected.backward()
            assert of_ranks.grad is not None
            dist.all_reduce(of_ranks.grad)
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(of_ranks.grad, alone.grad)
    dist.destroy_process_group()


def errors(rank: int, world: int, store: str, form: str) -> None:
    """Whatever is wrong on one rank is raised on all of them."""
    start(rank, world, store)
    x, labels, _ = data(torch.float32)
    own, last = part(rank, world), rank == world - 1
    x, labels = x[own], labels[own]
    loss = FORMS[form](flashmetric.SupConLoss())

    class Failing(flashmetric.SupConLoss):
        def forward(self, *args: Any) -> Tensor:
            if last:
                raise MemoryError("no memory on the last rank")
            return super().forward(*args)

    def raised(run: Callable[[], object]) -> str:
        try:
            run()
        except Exception as error:  # noqa: BLE001 - what kind it is, is the question
            return f"{type(error).__name__}: {error}"
        return "nothing"

    message = raised(lambda: loss(x[:, :4] if last else x, labels))
    assert "RankError" in message and "number of features" in message, message
    message = raised(lambda: loss(x.double() if last else x, labels))
    assert "RankError" in message and "dtype of embeddings" in message, message
    message = raised(lambda: loss(x, labels[1:] if last else labels))
    assert ("ValueError: labels" if last else f"on rank {world - 1}") in message, message
    other = FORMS[form](flashmetric.SupConLoss(0.1 if last else 0.2))
    assert "loss" in raised(lambda: other(x, labels))
    message = raised(lambda: FORMS[form](Failing())(x, labels))
    assert ("MemoryError" if last else "another rank has failed") in message, message
    # The group still works.
    assert loss(x, labels).isfinite()
    dist.destroy_process_group()
