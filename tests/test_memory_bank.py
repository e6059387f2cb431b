# SPDX-License-Identifier: Apache-2.0
"""The cross-batch memory: which pairs count, what enters, and what is kept."""

import copy

import pytest
import torch

import flashmetric
from flashmetric import ContrastiveLoss, CrossBatchMemory, SupConLoss, TripletMarginLoss, miners
from flashmetric.catalog import ENTRIES
from flashmetric.labels import ignoring, multi_hot, two_level
from flashmetric.ops.labels import IGNORED
from flashmetric.row_queue import RowQueue
from helpers import make_labels, make_rows

# The compiler itself instantiates autograd functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

BATCH = {entry.name: entry for entry in ENTRIES if entry.call == "batch"}
# These mine or count by labels; with a list of all pairs they are another loss.
MINED = {"TripletMarginLoss", "TripletQuotientLoss", "LMNNLoss", "NPairsLoss"}
STATE = ("embeddings", "labels", "pointer", "filled")


def batches(count, n=10, d=5, dtype=torch.float64, classes=3):
    return [(make_rows(n, d, dtype), make_labels(n, classes)) for _ in range(count)]


def make(name):
    torch.manual_seed(0)
    options = dict(BATCH[name].example)
    return getattr(flashmetric, name)(**options).double()


def after(memory, given):
    """The loss of the last batch and its gradient."""
    for x, labels in given:
        value = memory(x, labels)
    return value, torch.autograd.grad(value, given[-1][0])[0]


def explicit(loss, given, kept, batch_gradient):
    """The same by the pairs of the last batch with itself and the rows that are kept."""
    (x, labels), old = given[-1], [(r.detach(), c) for r, c in given[:-1]]
    rows = torch.cat([r for r, _ in old])[len(old) * len(x) - kept :]
    refs = torch.cat((x if batch_gradient else x.detach(), rows))
    ref_labels = torch.cat((labels, torch.cat([c for _, c in old])[len(old) * len(x) - kept :]))
    same = labels[:, None] == ref_labels
    other = torch.ones_like(same)
    other[:, : len(x)].fill_diagonal_(False)
    pairs = (*(same & other).nonzero().T, *(~same).nonzero().T)
    value = loss(x, labels, pairs, refs, ref_labels)
    return value, torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("batch_gradient", [False, True], ids=["constant", "gradient"])
@pytest.mark.parametrize("name", sorted(BATCH.keys() - MINED))
def test_every_loss_is_that_of_its_pairs(name, batch_gradient):
    loss, given = make(name), batches(3, d=6)
    given = [((x.detach().abs() * 0.4).requires_grad_(), labels) for x, labels in given]
    memory = CrossBatchMemory(loss, 25, batch_gradient=batch_gradient)
    expected = explicit(loss, given, 15, batch_gradient)
    torch.testing.assert_close(after(memory, given), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", sorted(MINED))
def test_losses_that_choose_leave_the_row_itself_out(name):
    loss, given = make(name), batches(3, n=7)
    value, grad = after(CrossBatchMemory(loss, 64, compare="batch+memory"), given)
    assert value.isfinite() and value > 0 and grad.abs().sum() > 0
    # As in a batch that is an exact copy, were the row itself not left out, distance 0 would be
    # its positive: without any other of its class it has none.
    alone = CrossBatchMemory(loss, 64, compare="batch+memory")
    assert alone(make_rows(5, 5), torch.arange(5)).item() == 0


def test_hardest_positive_and_negative_of_batch_and_memory():
    loss, given = TripletMarginLoss(margin=5.0), batches(3, n=8)
    value, grad = after(CrossBatchMemory(loss, 16), given)
    (x, labels), (r, c) = given[-1], given[-2]
    d = torch.cdist(x, torch.cat((x.detach(), r.detach())))
    same = labels[:, None] == torch.cat((labels, c))
    itself = torch.nn.functional.pad(torch.eye(8, dtype=torch.bool), (0, 8))
    farthest = d.masked_fill(~same | itself, -torch.inf).amax(1)
    nearest = d.masked_fill(same, torch.inf).amin(1)
    expected = (farthest - nearest + 5).relu()[farthest.isfinite() & nearest.isfinite()].mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("compare", ["queue", "batch+memory", "memory"])
def test_what_the_batch_is_paired_with(compare):
    memory = CrossBatchMemory(ContrastiveLoss(reduction="sum", neg_margin=0.0), 4, compare=compare)
    memory(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 0, 0]))
    value = memory(torch.tensor([[0.0], [100.0]]), torch.tensor([0, 9]))
    # The queue had three rows; two enter and leave no place for the first.
    assert value.item() == {"queue": 2 + 4, "batch+memory": 1 + 2 + 4, "memory": 1 + 2 + 4}[compare]


@pytest.mark.parametrize("size", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_first_in_first_out(size, masked):
    queue, expected = RowQueue(size), []
    generator = torch.Generator().manual_seed(size)
    for step, n in enumerate([2, 4, 1, 9, 0, 5, 12, 3]):
        rows = torch.arange(n).unsqueeze(1) + 100.0 * step
        labels = torch.arange(n) + 100 * step
        mask = torch.rand(n, generator=generator) < 0.5 if masked else None
        queue.enqueue(rows, labels, mask)
        expected += (labels if mask is None else labels[mask]).tolist()
        held = expected[-size:]
        first = len(expected) % size
        in_order = torch.cat((queue.labels[first:], queue.labels[:first]))
        assert in_order[size - len(held) :].tolist() == held
        assert queue.pointer.item() == first
        assert queue.filled.item() == len(held)
        assert torch.equal(
            queue.embeddings[queue.labels != IGNORED, 0].long(),
            queue.labels[queue.labels != IGNORED],
        )


def test_a_batch_larger_than_the_memory():
    loss, (x, labels) = SupConLoss(), batches(1, n=12)[0]
    memory = CrossBatchMemory(loss, 5)
    value = memory(x, labels)
    itself = torch.arange(12)
    of = [
        two_level(labels[s], itself[s], positives="different") for s in (slice(None), slice(7, 12))
    ]
    torch.testing.assert_close(value, loss(x, of[0], None, x.detach()[7:], of[1]))
    assert torch.equal(memory.embeddings[memory.places(x.device).argsort()], x[7:])


def test_masked_rows_enter_and_the_others_are_anchors():
    loss, given = ContrastiveLoss(), batches(3, n=8)
    memory, plain = CrossBatchMemory(loss, 10), RowQueue(10)
    mask = torch.tensor([True, False, False, True, True, False, True, False])
    for x, labels in given:
        value = memory(x, labels, enqueue_mask=mask)
        plain.enqueue(x[mask].detach(), labels[mask])
        known = plain.labels != IGNORED
        refs, ref_labels = plain.embeddings[known], plain.labels[known]
        expected = loss(x[~mask], labels[~mask], ref_emb=refs, ref_labels=ref_labels)
        torch.testing.assert_close(value, expected)
        grads = [torch.autograd.grad(v, x)[0] for v in (value, expected)]
        torch.testing.assert_close(*grads)
    assert all(torch.equal(getattr(memory, name), getattr(plain, name)) for name in STATE)


def test_given_pairs_number_the_batch_first():
    loss, given = ContrastiveLoss(reduction="sum"), batches(2, n=6)
    memory = CrossBatchMemory(loss, 6)
    memory(*given[0])
    x, labels = given[1]
    pairs = miners.BatchHardMiner()(x, labels)
    torch.testing.assert_close(memory(x, labels, pairs), loss(x, labels, pairs))
    one = torch.tensor([0])
    # Of place 2 of the queue, which batch 2 has written to by now.
    value = memory(x, labels, (one, torch.tensor([6 + 2]), one[:0], one[:0]))
    torch.testing.assert_close(value, (x[0] - x[2]).norm())


def test_a_miner_chooses_from_the_same_pairs():
    given = batches(3, n=9)
    mined = CrossBatchMemory(
        TripletMarginLoss(margin=5.0), 20, miner=miners.BatchHardMiner(normalize=False)
    )
    fixed = copy.deepcopy(mined)
    fixed.fixed_size = True
    plain = CrossBatchMemory(TripletMarginLoss(margin=5.0), 20)
    expected = after(plain, given)
    torch.testing.assert_close(after(mined, given), expected)
    torch.testing.assert_close(after(fixed, given), expected)


def test_the_gradient_stops_at_the_memory():
    (x, labels), (y, _) = batches(2)
    memory = CrossBatchMemory(SupConLoss(), 30, batch_gradient=True)
    memory(x, labels)
    memory(y, labels).backward()
    assert x.grad is None and y.grad is not None
    assert not memory.embeddings.requires_grad


def test_the_backward_may_come_after_the_next_call():
    given = batches(2)
    memory, again = (CrossBatchMemory(SupConLoss(), 15) for _ in range(2))
    values = [memory(x, labels) for x, labels in given]
    for value, (x, labels) in zip(values, given, strict=True):
        expected = torch.autograd.grad(again(x, labels), x)
        torch.testing.assert_close(torch.autograd.grad(value, x), expected)


def test_a_call_that_raises_changes_nothing():
    memory = CrossBatchMemory(SupConLoss(), 6)
    (x, labels), wrong = batches(1, n=4)[0], make_rows(4, 9)
    with pytest.raises(ValueError, match="distance"):
        CrossBatchMemory(SupConLoss(distance="none"), 6)
    for turn in range(2):
        before = copy.deepcopy(memory.state_dict())
        with pytest.raises(TypeError):
            memory(x, labels.float())
        with pytest.raises(ValueError):
            memory(x, labels[:3])
        with pytest.raises(ValueError, match="indices_tuple"):
            memory(x, labels, (labels,))
        if turn:
            with pytest.raises(ValueError, match="5 features, as the rows of the memory"):
                memory(wrong, labels)
        for name, value in memory.state_dict().items():
            assert torch.equal(value, before[name])
        memory(x, labels)
    assert memory.embeddings.shape == (6, 5)


def test_rows_that_overflow_spoil_one_step_only():
    memory = CrossBatchMemory(ContrastiveLoss(), 8)
    x, labels = make_rows(4, 3, torch.float32), torch.tensor([0, 0, 1, 1])
    bad = x.detach().clone()
    bad[1, 2], bad[2] = torch.inf, 1e30
    assert memory(bad, labels).isnan()
    assert memory.labels[:4].tolist() == [0, IGNORED, IGNORED, 1]
    assert memory(x, labels).isfinite()


def test_nothing_enters_in_eval_mode():
    memory = CrossBatchMemory(SupConLoss(), 20)
    given = batches(2)
    memory(*given[0])
    before = copy.deepcopy(memory.state_dict())
    value = memory.eval()(*given[1])
    assert all(torch.equal(v, before[k]) for k, v in memory.state_dict().items())
    torch.testing.assert_close(memory.train()(*given[1]), value)


def test_ignored_rows():
    memory = CrossBatchMemory(ContrastiveLoss(), 20)
    x, labels = batches(1, n=6)[0]
    marked = ignoring(labels.index_fill(0, torch.tensor([1, 4]), -1))
    keep = torch.tensor([0, 2, 3, 5])
    torch.testing.assert_close(memory(x, marked), ContrastiveLoss()(x[keep], labels[keep]))
    assert (memory.labels[:6] == IGNORED).tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(target):
    x, labels = batches(1, dtype=torch.float32)[0]
    memory = CrossBatchMemory(SupConLoss(), 16, dtype=target)
    memory(x, labels)
    assert memory.embeddings.dtype == target
    assert torch.equal(memory.embeddings[:10], x.detach().to(target))
    assert memory(x.detach().to(torch.float16), labels).dtype == torch.float32
    memory.double()
    assert memory.embeddings.dtype == torch.float64 and memory(x, labels).dtype == torch.float32
    other = CrossBatchMemory(SupConLoss(), 16)
    other.load_state_dict(memory.state_dict())
    assert other.embeddings.dtype == torch.float64


def test_reset():
    memory, (x, labels) = CrossBatchMemory(SupConLoss(), 25), batches(1)[0]
    first = memory(x, labels)
    assert memory(x, labels) != first
    memory.reset()
    assert memory.filled.item() == memory.pointer.item() == 0
    assert torch.equal(memory(x, labels), first)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("mined", [False, True], ids=["pairs", "mined"])
@pytest.mark.parametrize(
    "loss", [SupConLoss(), ContrastiveLoss(), TripletMarginLoss()], ids=lambda x: type(x).__name__
)
def test_compiles_to_one_graph(loss, mined, masked):
    torch.compiler.reset()
    miner = miners.BatchHardMiner() if mined else None
    memory = CrossBatchMemory(loss, 16, embedding_size=5, miner=miner, fixed_size=True)
    eager = copy.deepcopy(memory)
    compiled = torch.compile(memory, fullgraph=True, backend="aot_eager")
    for x, labels in batches(3, n=7, dtype=torch.float32):
        mask = torch.rand(7) < 0.5 if masked else None
        value, expected = (m(x, labels, enqueue_mask=mask) for m in (compiled, eager))
        torch.testing.assert_close(value, expected)
        grads = [torch.autograd.grad(v, x) for v in (value, expected)]
        torch.testing.assert_close(*grads)
    assert all(torch.equal(getattr(memory, name), getattr(eager, name)) for name in STATE)
    torch.compiler.reset()


def test_shapes_do_not_depend_on_contents():
    """Fake tensors hold no data: a step that asked for any would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        memory = CrossBatchMemory(SupConLoss(), 16, embedding_size=5)
        x, labels = torch.randn(7, 5), torch.zeros(7, dtype=torch.int64)
        assert memory(x, labels).shape == ()
        assert memory(x, labels, enqueue_mask=torch.zeros(7, dtype=torch.bool)).shape == ()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"size": 0}, ValueError, "size must be at least 1"),
        ({"size": 2.0}, TypeError, "size must be an integer"),
        ({"loss": torch.nn.MSELoss()}, TypeError, "loss must be a loss of flashmetric"),
        ({"miner": max}, TypeError, "miner must be a miner of flashmetric"),
        ({"compare": "all"}, ValueError, "compare must be one of"),
        ({"batch_gradient": 1}, TypeError, "batch_gradient must be True or False"),
        ({"dtype": torch.int64}, TypeError, "dtype must be float32"),
        ({"embedding_size": 0}, ValueError, "embedding_size must be at least 1"),
    ],
)
def test_wrong_options(options, error, match):
    with pytest.raises(error, match=match):
        CrossBatchMemory(**{"loss": SupConLoss(), "size": 4, **options})


def test_wrong_calls():
    memory, (x, labels) = CrossBatchMemory(SupConLoss(), 4), batches(1, n=4)[0]
    mask = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="one class per row"):
        memory(x, multi_hot(torch.ones(4, 2)))
    with pytest.raises(ValueError, match="one class per row"):
        memory(x, two_level(labels, labels))
    with pytest.raises(ValueError, match="enqueue_mask must be None with indices_tuple"):
        memory(x, labels, (labels, labels, labels), mask)
    with pytest.raises(TypeError, match="enqueue_mask must be a bool tensor"):
        memory(x, labels, enqueue_mask=mask.long())
    with pytest.raises(ValueError, match="enqueue_mask must have shape"):
        memory(x, labels, enqueue_mask=mask[:3])


def test_repr():
    memory = CrossBatchMemory(SupConLoss(), 4, compare="memory", dtype=torch.float16)
    assert "size=4, dtype=torch.float16, compare='memory'" in repr(memory)
