# SPDX-License-Identifier: Apache-2.0
"""Memories and chunked encoding in several processes, against one process with all rows."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from flashmetric import CrossBatchMemory, GradCache, MomentumQueue, SupConLoss, grad_cache
from helpers import make_labels, make_rows

STATE = ("embeddings", "labels", "pointer", "filled")
WORLD = 2
COUNTS = (7, 4)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the Gloo backend")


def start(rank, store, job):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        torch.manual_seed(0)
        job(rank)
    finally:
        dist.destroy_process_group()


def in_processes(job, tmp_path):
    torch.multiprocessing.spawn(start, (tmp_path / "store", job), nprocs=WORLD)


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


@pytest.mark.parametrize("job", [cross_batch, momentum, chunks_under_ddp])
def test_in_two_processes(job, tmp_path):
    in_processes(job, tmp_path)
