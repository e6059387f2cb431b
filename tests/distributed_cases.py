# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_distributed.py run: every loss on parts of a batch."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import flashmetric
from flashmetric import miners
from flashmetric.catalog import ENTRIES
from flashmetric.distributed import gather_loss, ring_loss
from flashmetric.labels import multi_hot

FORMS: dict[str, Callable[..., nn.Module]] = {"gather": gather_loss, "ring": ring_loss}
# Of these sizes are the parts; the last has no positives.
PARTS = {2: (25, 16), 4: (14, 3, 13, 11)}
WITHOUT_PAIRS = 11
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
        served = not (form == "ring" and entry.name in NEED_ALL_ROWS)
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


def leaves(*weights: Tensor) -> list[Tensor]:
    return [weight.clone().requires_grad_() for weight in weights]


def compare(name: str, loss: nn.Module, ours: Any, theirs: Any) -> None:
    """Value and gradients of all ranks against those of one process.

    ``ours`` and ``theirs`` are a value and the leaves that it depends on; the loss may have
    parameters too.
    """
    found = []
    for value, tensors in (ours, theirs):
        loss.zero_grad()
        value.backward()
        parameters = [p.grad for p in loss.parameters() if p.requires_grad]
        found.append([value.detach(), *(t.grad for t in tensors), *parameters])
    for gradient in found[0][1:]:
        if gradient is not None:
            dist.all_reduce(gradient)
    for place, (mine, whole) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(
            mine, whole, rtol=1e-9, atol=1e-9, msg=lambda m, n=(name, place): f"{n}: {m}"
        )


def every_loss(rank: int, world: int, form: str) -> None:
    """Value, and gradients of encoder and loss, against those of one process, in float64."""
    x, labels, weight = data(torch.float64)
    own = part(rank, world)
    for name, loss in losses(form).items():
        loss = loss.double()
        (leaf,), (alone,) = leaves(weight), leaves(weight)
        value = FORMS[form](loss, average=False)(x[own] @ leaf, labels[own])
        compare(name, loss, (value, [leaf]), (loss(x @ alone, labels), [alone]))


def mined(rank: int, world: int, form: str) -> None:
    """Pairs and triplets that a miner has chosen from the rows of all ranks."""
    x, labels, weight = data(torch.float64)
    own = part(rank, world)
    pairs = miners.MultiSimilarityMiner(0.3)
    triplets = miners.TripletMarginMiner(0.3, type_of_triplets="all")
    for name, loss in losses(form).items():
        if name in ("NPairsLoss", "QuadrupletLoss"):
            continue
        loss = loss.double()
        for miner in (pairs, triplets):
            (leaf,), (alone,) = leaves(weight), leaves(weight)
            whole = x @ alone
            indices = miner(whole, labels)
            assert all(len(index) for index in indices)
            try:
                expected = loss(whole, labels, indices)
            except (TypeError, ValueError) as error:
                # A loss that does its own mining takes none; on any rank.
                assert "indices_tuple" in str(error), error
                continue
            call = gather_loss(loss, average=False, miner=miner)
            value = call(x[own] @ leaf, labels[own])
            compare(f"{name}, {miner}", loss, (value, [leaf]), (expected, [alone]))
    images, texts = leaves(weight, weight.flip(0)), leaves(weight, weight.flip(0))
    clip = flashmetric.ContrastiveImageTextLoss().double()
    call = gather_loss(clip, average=False, miner=pairs)
    value = call(x[own] @ images[0], labels[own], x[own] @ images[1], labels[own])
    towers_of_all = x @ texts[0], x @ texts[1]
    indices = pairs(towers_of_all[0], labels, towers_of_all[1], labels)
    expected = clip(towers_of_all[0], labels, indices, towers_of_all[1], labels)
    compare("CLIP, mined", clip, (value, images), (expected, texts))


def encoder() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))


def same_step(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    """Gradients in float32, to the last digits that sums in another order change."""
    assert len(ours) == len(theirs)
    for mine, whole in zip(ours, theirs, strict=True):
        assert mine is not None and whole is not None
        size = float(whole.abs().max())
        assert size > 0
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-6 * size)


def data_parallel(rank: int, world: int, form: str) -> None:
    """A step of DistributedDataParallel in float32: the same gradients as one process has."""
    x, labels, _ = data(torch.float32)
    own = part(rank, world)
    for make in (flashmetric.SupConLoss, flashmetric.ContrastiveImageTextLoss):
        loss, alone, model, whole = make(), make(), encoder(), encoder()
        parallel: nn.Module = nn.parallel.DistributedDataParallel(model)
        call: nn.Module = FORMS[form](loss)
        if list(loss.parameters()):
            # The learned temperature: its gradients are averaged with those of the encoder.
            call = nn.parallel.DistributedDataParallel(call)
        value = call(parallel(x[own]), labels[own])
        expected = alone(whole(x), labels)
        value.backward()
        expected.backward()
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0.0)
        ours = [p.grad for module in (model, loss) for p in module.parameters()]
        same_step(ours, [p.grad for module in (whole, alone) for p in module.parameters()])


def sharded(rank: int, world: int, form: str) -> None:
    """A step of FSDP2, which shards the parameters: gradients as one process has."""
    # Not above: it takes seconds.
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    x, labels, _ = data(torch.float32)
    own = part(rank, world)
    model, whole = encoder(), encoder()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    loss = flashmetric.MultiSimilarityLoss()
    value = FORMS[form](loss)(model(x[own]), labels[own])
    expected = loss(whole(x), labels)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0.0)
    shards = [p.grad for p in model.parameters()]
    assert all(isinstance(shard, DTensor) for shard in shards)
    same_step([shard.full_tensor() for shard in shards], [p.grad for p in whole.parameters()])


def towers(rank: int, world: int, form: str) -> None:
    """Two towers, with and without labels; one way and both ways."""
    x, labels, weight = data(torch.float64)
    own = part(rank, world)
    towered: dict[str, nn.Module] = {
        "InfoNCE": flashmetric.InfoNCELoss(),
        "SigLIP": flashmetric.SigLIPLoss(),
        "CLIP": flashmetric.ContrastiveImageTextLoss(),
        "CLIP in": flashmetric.ContrastiveImageTextLoss(form="in", reduction="sum"),
        "CLIP fixed": flashmetric.ContrastiveImageTextLoss(learn_temperature=False),
        "CLIP limit": flashmetric.ContrastiveImageTextLoss(0.005),
    }
    # Texts of their own number and classes, among them ones of no image.
    of_texts = torch.cat([labels[:30], labels[:30] + 3])
    chosen = slice(own.start // 2, own.stop)
    tags = torch.stack([labels % 2, labels % 3 == 0, labels < 5], 1)
    text_tags = torch.stack([of_texts % 3 == 1, of_texts % 2, of_texts % 2 == 0], 1)
    cases: dict[str, Any] = {
        "rows": (None, None, own),
        "labels": (labels, labels, own),
        "several texts": (labels, of_texts, chosen),
        "tags": (multi_hot(tags), multi_hot(text_tags), chosen),
    }
    for case, (of_x, of_refs, there) in cases.items():
        for name, loss in towered.items():
            loss = loss.double()
            if name == "SigLIP" and case != "rows":
                continue
            ours, alone = leaves(weight, weight.flip(0)), leaves(weight, weight.flip(0))
            texts = x.flip(1) if of_refs is None or len(of_refs) == 41 else x.flip(1).repeat(2, 1)
            # Every rank has its own part; one process has all of these, in their order.
            parts = [part(r, world) for r in range(world)]
            if there is not own:
                parts = [slice(p.start // 2, p.stop) for p in parts]
            whole = torch.cat([torch.arange(len(texts))[p] for p in parts])
            mine = None if of_x is None else rows_of(of_x, own)
            mine_refs = None if of_refs is None else rows_of(of_refs, there)
            call = FORMS[form](loss, average=False)
            given = (x[own] @ ours[0], mine, texts[there] @ ours[1], mine_refs)
            if form == "ring" and case == "tags" and name.startswith("CLIP") and name != "CLIP in":
                try:
                    call(*given)
                except ValueError as error:
                    assert "one class per row" in str(error)
                    continue
                raise AssertionError("nothing raised")
            refs = None if of_refs is None else rows_of(of_refs, whole)
            expected = loss(x @ alone[0], of_x, ref_emb=texts[whole] @ alone[1], ref_labels=refs)
            compare(f"{name}, {case}", loss, (call(*given), ours), (expected, alone))


def rows_of(labels: Any, index: Any) -> Any:
    if isinstance(labels, Tensor):
        return labels[index]
    return type(labels)(labels.words[index], labels.rule)


def compiled(rank: int, world: int) -> None:
    """Inside of what a compiler compiles, and around a loss that it has compiled: all ranks."""
    x, labels, weight = data(torch.float64)
    own = part(rank, world)
    for make in (flashmetric.SupConLoss, flashmetric.TripletMarginLoss):
        for form in FORMS.values():
            (leaf,), (alone,) = leaves(weight), leaves(weight)
            call = form(make(), average=False)
            step = torch.compile(lambda x, y, leaf, call=call: call(x @ leaf, y), backend="eager")
            expected = make()(x @ alone, labels)
            value = step(x[own], labels[own], leaf)
            compare("a compiled step", call, (value, [leaf]), (expected, [alone]))
            inner = make()
            inner.compile(backend="eager")
            (leaf,), (alone,) = leaves(weight), leaves(weight)
            value = form(inner, average=False)(x[own] @ leaf, labels[own])
            expected = make()(x @ alone, labels)
            compare("a compiled loss", inner, (value, [leaf]), (expected, [alone]))
            copied = copy.deepcopy(form(make(), dist.group.WORLD))
            torch.testing.assert_close(copied(x[own], labels[own]), make()(x, labels))


def default_backend(rank: int, world: int, form: str) -> None:
    """A group that names no backend, and one of some ranks only."""
    x, labels, _ = data(torch.float32)
    everyone = dist.new_group(list(range(world)), backend=None)
    reverse = dist.new_group([world - 1, *range(world - 1)])
    for group in (everyone, reverse):
        own = part(dist.get_rank(group), world)
        # It wants the longest list of positives of any rank.
        loss = flashmetric.LiftedStructureLoss()
        leaf = x.clone().requires_grad_()
        value = FORMS[form](loss, group, average=False)(leaf[own], labels[own])
        value.backward()
        torch.testing.assert_close(value, loss(x, labels))
