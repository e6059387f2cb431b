# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_distributed.py run: one rank fails, and the others have to know."""

import copy
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flashmetric
from distributed_cases import FORMS, data, part
from flashmetric.distributed import gather_loss
from flashmetric.labels import Labels

# More than all numbers that two ranks tell each other before they compute.
_MANY = 32


def raised(run: Callable[[], object]) -> str:
    try:
        run()
    except Exception as error:  # noqa: BLE001 - what kind it is, is the question
        return f"{type(error).__name__}: {error}"
    return "nothing"


def errors(rank: int, world: int, form: str) -> None:
    """Whatever is wrong on one rank is raised on all of them."""
    x, labels, _ = data(torch.float32)
    own, last = part(rank, world), rank == world - 1
    x, labels = x[own], labels[own]
    loss = FORMS[form](flashmetric.SupConLoss())

    def fail(*_: Any) -> None:
        raise MemoryError("no memory on the last rank")

    failing = flashmetric.SupConLoss()
    if last:
        failing.register_forward_pre_hook(fail)

    def disagree(what: str, *given: Any, call: nn.Module = loss) -> None:
        message = raised(lambda: call(*given))
        assert "RankError" in message and what in message, message

    def wrong(what: str, *given: Any) -> None:
        message = raised(lambda: loss(*given))
        assert (what if last else f"wrong arguments on rank {world - 1}") in message, message

    ids = torch.stack([labels, labels], 1)
    disagree("number of features", x[:, :4] if last else x, labels)
    disagree("dtype of embeddings", x.double() if last else x, labels)
    disagree("use of ref_emb", *((x, labels, x, labels) if last else (x, labels)))
    words = Labels(ids, "equal") if last else labels
    disagree("number of words per label", x, words, x, words)
    rule = Labels(labels, "any") if last else labels
    disagree("kind of labels", x, rule, x, rule)
    disagree("loss and kind", x, labels, call=FORMS[form](flashmetric.SupConLoss(0.1 + last)))
    average = FORMS[form](flashmetric.SupConLoss(), average=last)
    disagree("average must be the same", x, labels, call=average)
    other = FORMS["ring" if last else "gather"](flashmetric.SupConLoss())
    disagree("form (0 gather_loss, 1 ring_loss) must be the same", x, labels, call=other)
    disagree("use of labels", x, *((labels, x, labels) if last else (None, x, None)))
    kind = flashmetric.TripletMarginLoss() if last else flashmetric.SupConLoss()
    disagree("loss and kind", x, labels, call=FORMS[form](kind))
    wrong("ValueError: labels", x, labels[1:] if last else labels)
    wrong("TypeError: embeddings", None if last else x, labels)
    wrong("TypeError: embeddings", x.long() if last else x, labels)
    nowhere = (x.to("meta"), labels.to("meta")) if last else (x, labels)
    wrong("ValueError: embeddings must be on a device", *nowhere)
    wrong("labels must be one class", x, Labels(ids, "equal") if last else labels)
    per_class = flashmetric.MarginLoss(learn_beta=True, num_classes=200)
    message = raised(lambda: FORMS[form](per_class)(x, labels))
    assert "ValueError: loss must not have a margin or beta per class" in message, message
    disagree("need of gradients", x.clone().requires_grad_(last), labels)
    learned = flashmetric.SupConLoss(flashmetric.LearnedTemperature())
    disagree("need of gradients", x, labels, call=FORMS[form](learned.requires_grad_(not last)))
    # Without a backward pass it does not matter.
    with torch.set_grad_enabled(last):
        assert FORMS[form](learned.requires_grad_(False))(x, labels).isfinite()
    message = raised(lambda: FORMS[form](failing)(x, labels))
    assert ("MemoryError" if last else "another rank has failed") in message, message
    # The group still works.
    assert loss(x, labels).isfinite()


def ends(rank: int, store: str, form: str) -> None:
    """A process that is killed between two steps; the exit code of the other says what it saw."""
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{store}")
    loss = FORMS[form](flashmetric.SupConLoss())
    x, labels, _ = data(torch.float32)
    loss(x, labels)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        loss(x, labels)
    except RuntimeError:
        # Nor does the group let go of what is under way.
        os._exit(0)
    os._exit(1)


def choice_among_anchors(rank: int, world: int) -> None:
    """Losses that choose among all anchors: a rank has those of the others as references only."""
    x, labels, _ = data(torch.float32)
    own = part(rank, world)
    for make in (flashmetric.NPairsLoss, flashmetric.QuadrupletLoss):
        call = gather_loss(make())
        for labelled in ((labels[own], labels[own]), (None, None)):
            given = x[own], labelled[0], x[own] + 1, labelled[1]
            message = raised(lambda given=given, call=call: call(*given))
            expected = f"ValueError: ref_emb must be None for {make.__name__} over all ranks"
            assert expected in message, message
        torch.testing.assert_close(call(x[own], labels[own]), make()(x, labels))


class _NoMemory(TorchDispatchMode):
    """The ``place``-th operation that needs memory for many numbers gets none."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place, self.seen = place, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        elsewhere = func.namespace == "c10d" or any(r.alias_info for r in func._schema.returns)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not elsewhere and any(tensor.numel() >= _MANY for tensor in tensors):
            self.seen += 1
            if self.seen == self.place:
                raise MemoryError(f"no memory for {func}")
        return result


def out_of_memory(rank: int, world: int, form: str) -> None:
    """One rank runs out of memory, wherever in the loss that is: all know, and can go on."""
    x, labels, _ = data(torch.float32)
    own, last = part(rank, world), rank == world - 1
    made = (
        flashmetric.SupConLoss(),
        # It wants the longest list of positives of any rank.
        flashmetric.LiftedStructureLoss(),
        # It merges log-sum-exps of the texts.
        flashmetric.ContrastiveImageTextLoss(),
    )
    for loss in made:
        call = FORMS[form](loss)
        given = x[own].clone().requires_grad_(), labels[own]
        expected = call(*given)
        with _NoMemory(0) as memory:
            call(*given)
        places = torch.tensor(memory.seen)
        dist.broadcast(places, world - 1)
        assert places > 10
        for place in range(1, int(places) + 1):
            with _NoMemory(place if last else 0):
                message = raised(lambda call=call, given=given: call(*given))
            assert message.startswith("MemoryError" if last else "RankError"), (place, message)
        assert torch.equal(call(*given), expected)


def pickled(rank: int, world: int, form: str) -> None:
    """Copies are of the same group; a pickle finds the default one where it is called."""
    x, labels, _ = data(torch.float32)
    own, everyone = part(rank, world), dist.new_group(list(range(world)))
    for group in (None, dist.group.WORLD, everyone):
        call = FORMS[form](flashmetric.SupConLoss(), group)
        copies = [copy.copy(call), copy.deepcopy(call)]
        assert all(copied.group is group for copied in copies)
        if group is everyone:
            message = raised(lambda call=call: pickle.dumps(call))
            assert "TypeError: group must be None or the default" in message, message
        else:
            copies.append(pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(call)))))
        for copied in copies:
            assert torch.equal(copied(x[own], labels[own]), call(x[own], labels[own]))
