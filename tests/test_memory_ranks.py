# SPDX-License-Identifier: Apache-2.0
"""Memories and chunked encoding in several processes, against one process with all rows."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from flashmetric import (
    ContrastiveLoss,
    CrossBatchMemory,
    GradCache,
    LearnedTemperature,
    MomentumQueue,
    SupConLoss,
    grad_cache,
)
from helpers import make_labels, make_rows
from ranks import Ranks

STATE = ("embeddings", "labels", "pointer", "filled")
WORLD = 2
COUNTS = (7, 4)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the Gloo backend")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    ranks = Ranks(WORLD, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def start(rank, world, job):
    torch.manual_seed(0)
    job(rank)


def equal_on_all_ranks(memory):
    for name in STATE:
        parts = [torch.empty_like(getattr(memory, name)) for _ in range(WORLD)]
        dist.all_gather(parts, getattr(memory, name))
        assert all(torch.equal(part, parts[0]) for part in parts)


def cross_batch(rank):
    for compare in ("queue", "batch+memory", "memory"):
        for masked in (False, True):
            loss = SupConLoss(reduction="none")
            whole = CrossBatchMemory(loss, 25, compare=compare)
            memory = CrossBatchMemory(loss, 25, compare=compare, group=dist.group.WORLD)
            for _ in range(4):
                x, labels = make_rows(sum(COUNTS), 5), make_labels(sum(COUNTS), 3)
                mask = torch.rand(sum(COUNTS)) < 0.5 if masked else None
                own = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
                value = memory(
                    x[own], labels[own], enqueue_mask=None if mask is None else mask[own]
                )
                expected = whole(x, labels, enqueue_mask=mask)[own]
                torch.testing.assert_close(value, expected)
                grads = [torch.autograd.grad(v.sum(), x)[0] for v in (value, expected)]
                torch.testing.assert_close(*grads)
                assert all(torch.equal(getattr(memory, n), getattr(whole, n)) for n in STATE)
            equal_on_all_ranks(memory)


def momentum(rank):
    memory, whole = MomentumQueue(25, group=dist.group.WORLD), MomentumQueue(25, reduction="none")
    for _ in range(4):
        queries, keys = make_rows(sum(COUNTS), 5), make_rows(sum(COUNTS), 5)
        own = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
        value = memory(queries[own], keys[own])
        torch.testing.assert_close(value, whole(queries, keys)[own].mean())
    equal_on_all_ranks(memory)


class Net(torch.nn.Module):
    def __init__(self, memory):
        super().__init__()
        self.encoder, self.memory = torch.nn.Linear(1, 1, bias=False), memory
        torch.nn.init.ones_(self.encoder.weight)

    def forward(self, x, labels):
        return self.memory(self.encoder(x), labels)


def own_rows_under_ddp(rank):
    """DistributedDataParallel overwrites the buffers of all ranks by those of rank 0."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    for features in (None, 1):
        memory = CrossBatchMemory(ContrastiveLoss(neg_margin=1e4), 4, embedding_size=features)
        model = DistributedDataParallel(Net(memory))
        alone = copy.deepcopy(memory)
        for step in range(3):
            x = torch.tensor([[1.0], [2.0]]) + 100 * rank + 10 * step
            labels = torch.tensor([0, 1]) + 2 * rank
            torch.testing.assert_close(model(x, labels), alone(x, labels))
        assert memory.embeddings.flatten().tolist() == [
            100 * rank + row for row in (21, 22, 11, 12)
        ]
        assert memory.labels.tolist() == [2 * rank, 2 * rank + 1] * 2
        assert list(model.state_dict())[-4:] == [f"module.memory.{name}" for name in STATE]
        loaded = DistributedDataParallel(Net(CrossBatchMemory(ContrastiveLoss(), 4)))
        set_model_state_dict(loaded, get_model_state_dict(model))
        for name in STATE:
            assert torch.equal(getattr(loaded.module.memory, name), getattr(memory, name))


def raises(error, match, call):
    with pytest.raises(error, match=match):
        call()


def fail(*_):
    raise MemoryError("the loss fails")


def failing_together(rank):
    from flashmetric.distributed.agreement import RankError

    x, labels = make_rows(7, 5), make_labels(7, 3)
    bad = rank == 1
    loss = SupConLoss(LearnedTemperature(0.1).double())
    memory = CrossBatchMemory(loss, 25, group=dist.group.WORLD)
    temperature = LearnedTemperature(0.1).double()
    queue = MomentumQueue(25, temperature=temperature, group=dist.group.WORLD)
    for full in (False, True):
        before = copy.deepcopy(memory.state_dict()), copy.deepcopy(queue.state_dict())
        raises(
            ValueError if bad else RankError,
            "labels must have shape" if bad else "wrong arguments on rank 1",
            lambda: memory(x, labels[:3] if bad else labels),
        )
        raises(TypeError if bad else RankError, "", lambda: memory([] if bad else x, labels))
        raises(TypeError if bad else RankError, "", lambda: queue(x, None if bad else x))
        narrow = x[:, :3] if bad else x
        # A queue that holds rows knows which rank is wrong.
        match = "features" if not full or bad else "wrong arguments on rank 1"
        error = ValueError if full and bad else RankError
        raises(error, match, lambda y=narrow: memory(y, labels))
        raises(error, match, lambda y=narrow: queue(y, y))
        raises(RankError, "dtype", lambda: memory(x.float() if bad else x, labels))
        mask = torch.ones(7, dtype=torch.bool) if bad else None
        raises(RankError, "use of enqueue_mask", lambda m=mask: memory(x, labels, None, m))
        raises(RankError, "training mode", lambda: copy.deepcopy(memory).train(bad)(x, labels))
        # What fails only while the loss is computed.
        pairs = (torch.full((1,), 99 if bad else 0),) * 4
        raises(ValueError if bad else RankError, "", lambda p=pairs: memory(x, labels, p))
        for module in (memory, queue):
            hook = module.loss.temperature.register_forward_pre_hook(fail) if bad else None
            second = x if module is queue else labels
            match = "the loss fails" if bad else "another rank has failed"
            raises(MemoryError if bad else RankError, match, lambda m=module, s=second: m(x, s))
            if hook is not None:
                hook.remove()
        for module, state in zip((memory, queue), before, strict=True):
            assert all(torch.equal(getattr(module, name), state[name]) for name in STATE)
        memory(x, labels)
        queue(x, x)
    equal_on_all_ranks(memory)
    # As after loading a state on one rank only.
    if bad:
        memory.reset()
    raises(RankError, "place of the next row", lambda: memory(x, labels))
    for features in (None, 5):
        options = {"embedding_size": features, "group": dist.group.WORLD}
        for options["dtype"] in (torch.float16 if bad else None, torch.float64):
            keeping = CrossBatchMemory(SupConLoss(), 25, **options), MomentumQueue(25, **options)
            for module, second in zip(keeping, (labels, x), strict=True):
                if options["dtype"] == torch.float64:
                    module(x, second)
                else:
                    raises(RankError, "the rows held", lambda m=module, s=second: m(x, s))
    # Each rank on its own: nothing to agree on outside of training.
    if bad:
        assert queue.eval()(x, x) > 0


def copies(rank):
    x, labels = make_rows(7, 5), make_labels(7, 3)
    part = dist.new_group([0, 1])
    for make in (
        lambda group: CrossBatchMemory(SupConLoss(), 25, group=group),
        lambda group: MomentumQueue(25, group=group),
    ):
        for group in (dist.group.WORLD, part):
            module = make(group)
            second = x if isinstance(module, MomentumQueue) else labels
            module(x, second)
            copied = [copy.deepcopy(torch.nn.Sequential(module))[0]]
            shared = copy.copy(module)
            assert copied[0].group is group and shared.group is group
            assert all(getattr(shared, name) is getattr(module, name) for name in STATE)
            if group is part:
                raises(
                    TypeError, "group must be None or the default", lambda m=module: pickle.dumps(m)
                )
            else:
                # A copy of a copy that has not been called yet, too.
                loaded = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(module))))
                copied += [loaded, copy.deepcopy(loaded)]
            y = make_rows(4 + rank, 5)
            second = y if isinstance(module, MomentumQueue) else labels[: 4 + rank]
            expected = module(y, second)
            for other in copied:
                assert torch.equal(other(y, second), expected)
                assert all(torch.equal(getattr(other, n), getattr(module, n)) for n in STATE)
                assert other.embeddings is not module.embeddings and other.group is group


def test_a_pickle_of_a_group_needs_one_when_it_is_called():
    memory = CrossBatchMemory(SupConLoss(), 25)
    memory.group = "default"
    loaded = pickle.loads(pickle.dumps(memory))
    with pytest.raises(RuntimeError, match="init_process_group first"):
        loaded(make_rows(7, 5), make_labels(7, 3))
    assert loaded.filled.item() == 0


def chunks_under_ddp(rank):
    encoder = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    plain, chunked = (DistributedDataParallel(copy.deepcopy(encoder)) for _ in range(2))
    exchanges = []

    def counting(state, bucket):
        exchanges.append(1)
        done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return done.then(lambda future: future.value()[0] / WORLD)

    chunked.register_comm_hook(None, counting)
    x, labels = torch.randn(2, 20, 6)[rank], make_labels(40, 3).view(2, 20)[rank]
    loss = SupConLoss()
    for step in range(2):
        expected = loss(plain(x), labels)
        expected.backward()
        value = grad_cache(chunked, loss, x, chunk_size=6 - rank, labels=labels)
        torch.testing.assert_close(value, expected.detach())
        for ours, theirs in zip(chunked.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        # One bucket holds everything: one exchange a step, whatever the number of chunks.
        assert len(exchanges) == step + 1
    # Both towers the same module, whose last chunk is that of the second.
    plain.zero_grad()
    chunked.zero_grad()

    def of_both(a, b):
        return loss(torch.cat((a, b)), torch.cat((labels, labels)))

    of_both(*plain(torch.cat((x, -x))).split(20)).backward()
    GradCache((chunked, chunked), of_both, 7)(x, -x)
    for ours, theirs in zip(chunked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert len(exchanges) == 3


@pytest.mark.parametrize(
    "job", [cross_batch, momentum, own_rows_under_ddp, failing_together, copies, chunks_under_ddp]
)
def test_in_two_processes(job, processes):
    if processes.closed:
        pytest.fail("the processes ended with an earlier failure")
    processes.run(start, job)
