# SPDX-License-Identifier: Apache-2.0
"""flashmetric.pml in the place of pytorch-metric-learning: names, wrappers, copies, precision."""

import copy
import importlib
import importlib.util
import inspect
import pickle

import pytest
import torch

pytest.importorskip("pytorch_metric_learning", reason="the peer pytorch-metric-learning is missing")

import pytorch_metric_learning  # noqa: E402
from pml_cases import arguments, check, forbid_matrices  # noqa: E402
from pytorch_metric_learning import losses as peer  # noqa: E402
from pytorch_metric_learning import miners as peer_miners  # noqa: E402
from pytorch_metric_learning.utils import distributed  # noqa: E402

import flashmetric.pml  # noqa: E402
from flashmetric.pml import losses, miners  # noqa: E402
from presets import assert_same, labelled_rows, value_and_grads  # noqa: E402

FUSED = [
    (module, name)
    for module in (losses, miners)
    for name in module.__all__
    if getattr(module, name).__module__.startswith("flashmetric")
]
SUPPORTED = [name for name in peer.CrossBatchMemory.supported_losses() if name != "MarginLoss"]


@pytest.mark.parametrize("module", ["losses", "miners", "distances", "reducers"])
def test_every_name(module):
    ours = importlib.import_module(f"flashmetric.pml.{module}")
    parents = importlib.import_module(f"pytorch_metric_learning.{module}")
    classes = {name for name, value in vars(parents).items() if inspect.isclass(value)}
    assert set(ours.__all__) == classes == set(dir(ours)) & classes
    for name in classes:
        assert issubclass(getattr(ours, name), getattr(parents, name))


@pytest.mark.parametrize(
    ("module", "name"), FUSED, ids=lambda value: getattr(value, "__name__", value)
)
def test_name_and_signature(module, name):
    kind = getattr(module, name)
    parent = getattr(peer if module is losses else peer_miners, name)
    assert kind.__name__ == name and issubclass(kind, parent) and kind is not parent
    assert inspect.signature(kind) == inspect.signature(parent)
    ours, parents = (inspect.signature(each.forward).parameters for each in (kind, parent))
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in parents.values()
    ]


def test_other_modules_are_the_parents():
    from flashmetric.pml import regularizers, samplers

    assert samplers.MPerClassSampler is pytorch_metric_learning.samplers.MPerClassSampler
    assert regularizers.LpRegularizer is pytorch_metric_learning.regularizers.LpRegularizer
    with pytest.raises(AttributeError, match="no attribute 'sampler'"):
        flashmetric.pml.sampler  # noqa: B018


def test_relatives_remain_relatives():
    assert issubclass(losses.SignalToNoiseRatioContrastiveLoss, losses.ContrastiveLoss)
    assert issubclass(miners.BatchHardMiner, miners.BatchEasyHardMiner)


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"python -m pip install 'flashmetric\[pml\]'"):
        importlib.reload(flashmetric.pml)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state_dict"])
def test_copies(copied):
    loss = losses.MarginLoss(learn_beta=True, num_classes=8).double()
    torch.nn.init.uniform_(loss.beta, 1.0, 1.3)
    if copied == "state_dict":
        other = losses.MarginLoss(learn_beta=True, num_classes=8).double()
        other.load_state_dict(loss.state_dict())
        peer.MarginLoss(learn_beta=True, num_classes=8).load_state_dict(loss.state_dict())
    else:
        other = copy.deepcopy(loss) if copied == "deepcopy" else pickle.loads(pickle.dumps(loss))
    check(other, loss, *arguments("batch", torch.float64))
    assert repr(other) == repr(loss)


@pytest.mark.parametrize("name", [name for _, name in FUSED if name in SUPPORTED])
@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised(name, symmetric):
    x, _ = labelled_rows(9, 6, 3)
    views = x + 0.1, labelled_rows(9, 6, 3, seed=2)[0]
    ours, theirs = (
        home.SelfSupervisedLoss(getattr(home, name)(), symmetric) for home in (losses, peer)
    )
    forbid_matrices(ours.loss)
    assert_same(value_and_grads(ours, *views), value_and_grads(theirs, *views))


@pytest.mark.parametrize("name", [*SUPPORTED, "MarginLoss"])
def test_cross_batch_memory(name):
    """Filled, overwritten, and with rows that only enter the queue."""
    options = {"beta": 1.25} if name == "MarginLoss" else {}
    ours, theirs = (
        home.CrossBatchMemory(getattr(home, name)(**options), 6, memory_size=37)
        for home in (losses, peer)
    )
    forbid_matrices(ours.loss)
    for step in range(8):
        x, labels = labelled_rows(1 if step == 5 else 12, 6, 4, seed=step)
        mask = None if step < 6 else torch.arange(12) < 6
        results = [
            value_and_grads(lambda x, m=m, y=labels, k=mask: m(x, y, enqueue_mask=k), x)
            for m in (ours, theirs)
        ]
        # The angle of a row with itself, which a batch of one row leaves in, has no gradient.
        assert_same(*([part.nan_to_num(nan=77.0) for part in parts] for parts in results))
    assert ours.queue_idx == theirs.queue_idx
    assert ours.embedding_memory.equal(theirs.embedding_memory)


def test_cross_batch_memory_lists_no_pairs(monkeypatch):
    def listed(*_):
        raise AssertionError("all pairs were listed")

    lmu = importlib.import_module("pytorch_metric_learning.utils.loss_and_miner_utils")
    monkeypatch.setattr(lmu, "get_all_pairs_indices", listed)
    loss = losses.CrossBatchMemory(losses.ContrastiveLoss(), 6, memory_size=37)
    x, labels = labelled_rows(12, 6, 4)
    assert loss(x, labels) > 0


def test_cross_batch_memory_with_what_needs_lists():
    x, labels = labelled_rows(12, 6, 4)
    for miner in (None, "MultiSimilarityMiner"):
        for inner in ("SupConLoss", "swap"):
            made = []
            for home, home_miners in ((losses, miners), (peer, peer_miners)):
                loss = (
                    home.ContrastiveLoss(reducer=peer.PNPLoss().reducer)
                    if inner == "swap"
                    else home.SupConLoss()
                )
                picks = getattr(home_miners, miner)() if miner else None
                made.append(home.CrossBatchMemory(loss, 6, memory_size=37, miner=picks))
            torch.testing.assert_close(made[0](x, labels), made[1](x, labels))
    given = peer_miners.MultiSimilarityMiner()(x, labels)
    ours, theirs = (home.CrossBatchMemory(home.SupConLoss(), 6) for home in (losses, peer))
    torch.testing.assert_close(ours(x, labels, given), theirs(x, labels, given))


@pytest.mark.filterwarnings("ignore:ContrastiveLoss is computed by")
@pytest.mark.parametrize("method", ["forward", "compute_loss"])
def test_a_users_loss_in_cross_batch_memory_sees_the_list(method):
    def of_users(home):
        parent = home.ContrastiveLoss

        def first_three(self, embeddings, labels=None, indices_tuple=None, *refs):
            a1, p, a2, n = indices_tuple
            chosen = a1[:3], p[:3], a2, n
            return getattr(parent, method)(self, embeddings, labels, chosen, *refs)

        return type("ContrastiveLoss", (parent,), {method: first_three, "__module__": __name__})()

    ours, theirs = (home.CrossBatchMemory(of_users(home), 6) for home in (losses, peer))
    for seed in range(3):
        x, labels = labelled_rows(12, 6, 4, seed=seed)
        results = [value_and_grads(lambda x, m=m, y=labels: m(x, y), x) for m in (ours, theirs)]
        assert_same(*results)


def test_fallback_inside_of_cross_batch_memory():
    x, labels = labelled_rows(12, 6, 4)
    ours, theirs = (
        home.CrossBatchMemory(home.TripletMarginLoss(smooth_loss=True, distance=raw), 6)
        for home, raw in ((losses, _raw()), (peer, _raw()))
    )
    with pytest.warns(UserWarning, match="TripletMarginLoss is computed by"):
        value = ours(x, labels)
    torch.testing.assert_close(value, theirs(x, labels))


def _raw():
    return flashmetric.pml.distances.LpDistance(normalize_embeddings=False)


def test_multiple_losses():
    x, labels = labelled_rows(12, 6, 4)
    ours, theirs = (
        home.MultipleLosses(
            {"a": home.TripletMarginLoss(), "b": home.SupConLoss()},
            miners={"a": home_miners.BatchHardMiner()},
            weights={"a": 0.3, "b": 2},
        )
        for home, home_miners in ((losses, miners), (peer, peer_miners))
    )
    assert_same(
        value_and_grads(lambda x: ours(x, labels), x),
        value_and_grads(lambda x: theirs(x, labels), x),
    )


def test_distributed_wrappers():
    x, labels = labelled_rows(12, 6, 4)
    loss = distributed.DistributedLossWrapper(losses.CrossBatchMemory(losses.SupConLoss(), 6))
    assert loss.loss.loss(x, labels) > 0
    wrapped = distributed.DistributedLossWrapper(losses.TripletMarginLoss(), efficient=True)
    with pytest.warns(UserWarning, match="non-distributed"):
        assert wrapped(x, labels) == losses.TripletMarginLoss()(x, labels)
    distributed.DistributedMinerWrapper(miners.BatchHardMiner())


@pytest.mark.parametrize("call", ["copy of the labels", "copy of the rows", "both", "neither"])
@pytest.mark.parametrize(
    "name", ["TripletMarginLoss", "SupConLoss", "NCALoss", "LiftedStructureLoss"]
)
def test_self_pairs_by_the_rule_of_one_object(name, call):
    """The parent's rule, which the rest of this package does not have."""
    x, labels = labelled_rows(12, 6, 4)
    results = []
    for home in (losses, peer):
        leaf = x.clone().requires_grad_()
        refs = leaf if call in ("copy of the labels", "neither") else leaf * 1.0
        ref_labels = labels if call in ("copy of the rows", "neither") else labels.clone()
        value = getattr(home, name)()(leaf, labels, ref_emb=refs, ref_labels=ref_labels)
        value.backward()
        results.append([value.detach(), leaf.grad])
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["TripletMarginLoss", "ContrastiveLoss", "SupConLoss", "NTXentLoss"]
)
def test_half_precision(name, dtype):
    x, labels = labelled_rows(40, 16, 4, torch.float32)
    x = x.to(dtype)
    value, grad = value_and_grads(lambda x: getattr(losses, name)()(x, labels), x)
    truth, true_grad = value_and_grads(lambda x: getattr(peer, name)()(x, labels), x.double())
    assert value.dtype == grad.dtype == dtype
    torch.testing.assert_close(value.double(), truth, rtol=2e-2, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=5e-2, atol=2e-3)


@pytest.mark.parametrize("name", ["TripletMarginLoss", "SupConLoss", "MultiSimilarityLoss"])
def test_autocast_keeps_the_precision(name):
    x, labels = labelled_rows(40, 16, 4, torch.float32)
    expected = getattr(losses, name)()(x, labels)
    with torch.autocast("cpu", torch.bfloat16):
        value = getattr(losses, name)()(x, labels)
        miners.BatchHardMiner()(x, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


def test_a_training_loop_is_the_same():
    """Batch-hard triplets, a memory, a learned boundary: the same weights after each step."""

    def train(home, home_miners):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)
        ).double()
        margin = home.MarginLoss(learn_beta=True).double()
        memory = home.CrossBatchMemory(home.ContrastiveLoss(), 5, memory_size=64)
        triplet, miner = home.TripletMarginLoss(0.2), home_miners.BatchHardMiner()
        optimizer = torch.optim.Adam([*model.parameters(), *margin.parameters()], 1e-2)
        values = []
        for step in range(12):
            x, labels = labelled_rows(24, 6, 4, seed=step)
            rows = model(x)
            loss = triplet(rows, labels, miner(rows, labels)) + memory(rows, labels)
            loss = loss + margin(rows, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
        return torch.stack(values), *(p.detach() for p in model.parameters()), margin.beta.detach()

    assert_same(train(losses, miners), train(peer, peer_miners))
