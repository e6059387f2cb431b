# SPDX-License-Identifier: Apache-2.0
"""N-pairs, angular and SoftTriple losses against loops over pairs, classes and centres."""

import itertools

import pytest
import torch

import flashmetric
from flashmetric import functional as F
from flashmetric.labels import ignoring, multi_hot, two_level
from helpers import make_indices, make_rows
from loop_softmax import (
    kinds_of_labels,
    loop_angular,
    loop_n_pairs,
    loop_soft_triple,
    pairs_of_kinds,
)

# The compiler itself instantiates autograd functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def same(ours, loop, *leaves):
    torch.testing.assert_close(ours, loop, rtol=1e-9, atol=1e-11)
    got = torch.autograd.grad(ours.sum(), leaves)
    true = torch.autograd.grad(loop.sum(), leaves, allow_unused=True)
    for a, b, leaf in zip(got, true, leaves, strict=True):
        b = torch.zeros_like(leaf) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


LABELS = torch.tensor([2, 0, 0, 1, 2, 0, 5, 1, 2])
PAIRS = [(0, 4), (1, 2), (3, 7)]
L2 = [{}, {"l2": 0.1}, {"l2": 0.1, "l2_power": 1}]


def first_two(labels, ignored=None):
    rows = {}
    for i, label in enumerate(labels):
        rows.setdefault(label, []).append(i)
    return [tuple(r[:2]) for label, r in rows.items() if len(r) > 1 and label != ignored]


@pytest.mark.parametrize("options", L2)
@pytest.mark.parametrize("distance", ["dot", "cosine", "sqeuclidean"])
def test_n_pairs(options, distance):
    x = make_rows(9, 4)
    ours = F.n_pairs_loss(x, LABELS, distance=distance, **options)
    assert sorted(first_two(LABELS.tolist())) == PAIRS
    same(ours, loop_n_pairs(x, x, PAIRS, distance=distance, **options), x)


def test_n_pairs_by_anchor():
    x = make_rows(9, 4)
    for options in L2:
        by_row = F.n_pairs_loss(x, LABELS, reduction="none", **options)
        total = F.n_pairs_loss(x, LABELS, reduction="sum", **options)
        mean = F.n_pairs_loss(x, LABELS, **options)
        assert by_row.nonzero().flatten().tolist() == [0, 1, 3]
        torch.testing.assert_close((by_row.sum(), total), (total, 3 * mean))


@pytest.mark.parametrize("labels", list(itertools.product(range(3), repeat=4)), ids=str)
def test_n_pairs_selects_the_first_two_of_each_class(labels):
    x = make_rows(4, 3)
    ours = F.n_pairs_loss(x, torch.tensor(labels))
    same(ours, loop_n_pairs(x, x, first_two(labels)), x)


def test_n_pairs_selects_the_first_reference_of_each_class():
    generator = torch.Generator().manual_seed(1)
    for n, m in [(1, 1), (5, 3), (3, 6), (4, 4), (0, 3), (3, 0)] * 5:
        a = torch.randint(4, (n,), generator=generator)
        b = torch.randint(4, (m,), generator=generator)
        x, r = make_rows(n, 3), make_rows(m, 3)
        pairs = [
            (a.tolist().index(c), b.tolist().index(c))
            for c in range(4)
            if c in a.tolist() and c in b.tolist()
        ]
        ours = F.n_pairs_loss(x, a, ref_emb=r, ref_labels=b)
        same(ours, loop_n_pairs(x, r, pairs) + 0 * r.sum(), x, r)


@pytest.mark.parametrize("options", L2)
@pytest.mark.parametrize("extra", [0, 2])
def test_n_pairs_of_given_pairs(options, extra):
    x, r = make_rows(5, 4), make_rows(5 + extra, 4)
    chosen = [(i, i) for i in range(5)]
    loop = loop_n_pairs(x, r, chosen, negatives=range(5, 5 + extra), **options)
    same(F.n_pairs_loss(x, ref_emb=r, **options), loop, x, r)
    if not options and not extra:
        theirs = torch.nn.functional.cross_entropy(x @ r.T, torch.arange(5))
        torch.testing.assert_close(F.n_pairs_loss(x, ref_emb=r), theirs)
        by_row = torch.nn.functional.cross_entropy(x @ r.T, torch.arange(5), reduction="none")
        torch.testing.assert_close(F.n_pairs_loss(x, ref_emb=r, reduction="none"), by_row)


@pytest.mark.parametrize("length", [3, 4])
def test_n_pairs_of_listed_pairs(length):
    x = make_rows(9, 4)
    indices = make_indices(length, (12, 9), 9, 9)
    listed = list(zip(*(column.tolist() for column in indices[:2]), strict=True))
    firsts = {}
    for a, p in listed:
        firsts.setdefault(LABELS[a].item(), (a, p))
    ours = F.n_pairs_loss(x, LABELS, indices_tuple=indices)

    def loop(chosen):
        total = 0.0
        for i, (a, p) in enumerate(chosen):
            others = [x[a] @ (x[q] - x[p]) for k, (_, q) in enumerate(chosen) if k != i]
            total = total + torch.log1p(sum((v.exp() for v in others), x.sum() * 0))
        return total / len(chosen)

    same(ours, loop(list(firsts.values())), x)
    same(F.n_pairs_loss(x, indices_tuple=indices), loop(listed), x)


def test_n_pairs_of_other_labels():
    x = make_rows(6, 3)
    labels = [4, -1, -1, 4, 7, 7]
    ours = F.n_pairs_loss(x, ignoring(torch.tensor(labels)))
    same(ours, loop_n_pairs(x, x, first_two(labels, -1)), x)
    tags = torch.tensor([[1, 1], [0, 1], [1, 0], [1, 1], [0, 1], [0, 1]])
    ours = F.n_pairs_loss(x, multi_hot(tags, "all"))
    same(ours, loop_n_pairs(x, x, [(0, 3), (1, 4)]), x)
    wide = multi_hot(torch.cat((tags, torch.zeros(6, 70), tags.flip(0)), 1), "all")
    same(F.n_pairs_loss(x, wide), loop_n_pairs(x, x, first_two(map(tuple, wide.words.tolist()))), x)
    for several in (multi_hot(tags), two_level(LABELS[:6], LABELS[:6])):
        with pytest.raises(ValueError, match="one class"):
            F.n_pairs_loss(x, several)


def test_n_pairs_of_rows_without_pairs():
    for labels in ([], [0], [0, 1, 2]):
        x = make_rows(len(labels), 3)
        loss = F.n_pairs_loss(x, torch.tensor(labels, dtype=torch.int64), l2=0.1)
        assert loss == 0
        loss.backward()
        assert not x.grad.any()
    zeros = torch.zeros(4, 3, requires_grad=True)
    F.n_pairs_loss(zeros, torch.tensor([0, 0, 1, 1]), l2=0.1, l2_power=1).backward()
    assert not zeros.grad.any()


def test_n_pairs_presets():
    preset = flashmetric.NPairsLoss.preset
    a, p = make_rows(5, 4), make_rows(5, 4)
    plain = flashmetric.NPairsLoss()(a, ref_emb=p)
    squares = a.square().sum(1).mean() + p.square().sum(1).mean()
    torch.testing.assert_close(
        preset("tensorflow_addons")(a, ref_emb=p), plain + 0.25 * 0.002 * squares
    )
    torch.testing.assert_close(preset("paper")(a, ref_emb=p), plain + 0.25 * 0.02 * squares)
    lengths = torch.cat((a, p)).norm(dim=1).mean()
    torch.testing.assert_close(preset("rdml")(a, ref_emb=p), plain + 0.005 * lengths)
    with pytest.raises(ValueError, match="name must be one of"):
        preset("unknown")


ANGULAR = [
    {},
    {"alpha": 30},
    {"normalize": False},
    {"form": "hinge", "alpha": 20},
    {"form": "hinge", "alpha": 15, "normalize": False},
]


def angular_lists(labels, ref_labels=None):
    pos, neg = pairs_of_kinds(kinds_of_labels(labels, ref_labels))
    return [(a, p) for a, partners in enumerate(pos) for p in partners], neg


@pytest.mark.parametrize("refs", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", ANGULAR)
@pytest.mark.parametrize("max_positives", [None, 5])
def test_angular(refs, reduction, options, max_positives):
    x, r = 0.5 * make_rows(9, 4), 0.5 * make_rows(7, 4)
    ref_labels = torch.tensor([0, 1, 2, 2, 9, 0, 1])
    call = {"ref_emb": r, "ref_labels": ref_labels} if refs else {}
    lists = angular_lists(LABELS.tolist(), ref_labels.tolist() if refs else None)
    ours = F.angular_loss(
        x, LABELS, reduction=reduction, max_positives=max_positives, **options, **call
    )
    loop = loop_angular(
        x, r if refs else x, *lists, reduction=reduction, **{"alpha": 45, **options}
    )
    same(ours, loop, *([x, r] if refs else [x]))


def test_angular_of_listed_positives():
    x = make_rows(9, 4)
    indices = make_indices(3, (12, 9), 9, 9)
    positives = list(zip(*(column.tolist() for column in indices[:2]), strict=True))
    negatives = [[j for j in range(9) if LABELS[j] != LABELS[a]] for a in range(9)]
    ours = F.angular_loss(x, LABELS, indices_tuple=indices)
    same(ours, loop_angular(x, x, positives, negatives, alpha=45), x)
    with pytest.raises(ValueError, match="labels must be given with indices_tuple"):
        F.angular_loss(x, indices_tuple=indices)


def test_angular_of_other_labels():
    x = make_rows(6, 3)
    tags = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 1, 1], [0, 0, 1]])
    kinds = [
        [None if i == j else bool((a * b).any()) for j, b in enumerate(tags)]
        for i, a in enumerate(tags)
    ]
    pos, neg = pairs_of_kinds(kinds)
    positives = [(a, p) for a, partners in enumerate(pos) for p in partners]
    for limit in (None, 4):
        ours = F.angular_loss(x, multi_hot(tags), max_positives=limit)
        same(ours, loop_angular(x, x, positives, neg, alpha=45), x)
    labels = [4, -1, -1, 4, 7, 7]
    positives, negatives = [(0, 3), (3, 0), (4, 5), (5, 4)], {0: [4, 5], 3: [4, 5]}
    negatives.update({4: [0, 3], 5: [0, 3]})
    for limit in (None, 4):
        ours = F.angular_loss(x, ignoring(torch.tensor(labels)), max_positives=limit)
        same(ours, loop_angular(x, x, positives, negatives, alpha=45), x)


def test_angular_takes_the_farthest_positives():
    x = make_rows(8, 4)
    labels = torch.arange(8) // 4
    unit = torch.nn.functional.normalize(x.detach())
    positives = []
    for a in range(8):
        others = [p for p in range(8) if p != a and labels[p] == labels[a]]
        others.sort(key=lambda p, a=a: float(unit[a] @ unit[p]))
        positives += [(a, p) for p in others[:2]]
    negatives = angular_lists(labels.tolist())[1]
    same(
        F.angular_loss(x, labels, max_positives=2),
        loop_angular(x, x, positives, negatives, alpha=45),
        x,
    )


def test_angular_on_top_of_n_pairs():
    x = make_rows(9, 4)
    both = F.angular_loss(x, LABELS, n_pairs_lambda=2.0, l2=0.01)
    n_pairs = F.n_pairs_loss(x, LABELS, l2=0.01)
    torch.testing.assert_close(both, n_pairs + 2 * F.angular_loss(x, LABELS))
    preset = flashmetric.AngularLoss.preset("rdml")
    n_pairs = flashmetric.NPairsLoss.preset("rdml")(x, LABELS)
    torch.testing.assert_close(preset(x, LABELS), n_pairs + 2 * F.angular_loss(x, LABELS))


def test_angular_does_not_depend_on_lengths():
    x = make_rows(9, 4).detach()
    factors = torch.linspace(0.1, 10, 9, dtype=x.dtype).unsqueeze(1)
    torch.testing.assert_close(F.angular_loss(x * factors, LABELS), F.angular_loss(x, LABELS))


@pytest.mark.parametrize("labels", [[], [1], [1, 1, 1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("max_positives", [None, 1])
def test_angular_without_pairs(labels, max_positives):
    x = make_rows(len(labels), 3)
    labels = torch.tensor(labels, dtype=torch.int64)
    for reduction in ("mean", "none"):
        loss = F.angular_loss(x, labels, max_positives=max_positives, reduction=reduction).sum()
        assert loss == 0
        (grad,) = torch.autograd.grad(loss, x)
        assert not grad.any()


def test_wrong_angular_options():
    x, labels = make_rows(4, 3), torch.zeros(4).long()
    for alpha in (0, 90, -45):
        with pytest.raises(ValueError, match="alpha must be above 0 and below 90"):
            F.angular_loss(x, labels, alpha=alpha)
    with pytest.raises(TypeError, match="max_positives must be an integer"):
        F.angular_loss(x, labels, max_positives=1.5)


CENTERS = {"la": 6.0, "gamma": 0.2, "margin": 0.05, "tau": 0.3}


@pytest.mark.parametrize("per_class", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("slab", [None, 1, 40])
def test_soft_triple(per_class, reduction, slab, monkeypatch):
    if slab is not None:
        monkeypatch.setattr("flashmetric.ops.distance.SLAB_ELEMENTS", slab)
    x, labels = make_rows(7, 4), torch.tensor([0, 4, 2, 2, 1, 3, 4])
    centers = torch.randn(5, per_class, 4, dtype=torch.float64, requires_grad=True)
    ours = F.soft_triple_loss(x, labels, centers=centers, reduction=reduction, **CENTERS)
    loop = loop_soft_triple(x, labels.tolist(), centers, reduction=reduction, **CENTERS)
    same(ours, loop, x, centers)


def test_soft_triple_gradcheck():
    x, labels = make_rows(5, 3), torch.tensor([0, 2, 1, 1, 3])
    centers = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64)

    def loss(x, centers):
        options = {**CENTERS, "centers": centers}
        by_row = F.soft_triple_loss(x, labels, reduction="none", **options)
        return by_row @ weight + F.soft_triple_loss(x, labels, **options)

    assert torch.autograd.gradcheck(loss, (x, centers))


def test_soft_triple_of_unlabelled_rows():
    x, labels = make_rows(5, 3), torch.tensor([0, -1, 1, -1, 3])
    centers = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    ours = F.soft_triple_loss(x, ignoring(labels), centers=centers, **CENTERS)
    known = [None if label < 0 else label for label in labels.tolist()]
    same(ours, loop_soft_triple(x, known, centers, **CENTERS), x, centers)
    none = F.soft_triple_loss(x[:0], labels[:0], centers=centers, **{**CENTERS, "tau": 0.0})
    assert none == 0
    none.backward()
    assert not centers.grad.any()


def test_soft_triple_of_equal_and_zero_centers():
    x, labels = make_rows(4, 3), torch.tensor([0, 1, 1, 0])
    for fill in (0.0, 1.0):
        centers = torch.full((2, 3, 3), fill, dtype=torch.float64, requires_grad=True)
        loss = F.soft_triple_loss(x, labels, centers=centers)
        grads = torch.autograd.grad(loss, (x, centers))
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    with torch.no_grad():
        x.zero_()
    assert F.soft_triple_loss(x, labels, centers=torch.randn(2, 3, 3)).isfinite()


def test_soft_triple_module():
    loss = flashmetric.SoftTripletLoss(6, 4, centers_per_class=3)
    assert flashmetric.losses.SoftTripleLoss is flashmetric.SoftTripletLoss
    assert loss.centers.shape == (6, 3, 4) and list(dict(loss.named_parameters())) == ["centers"]
    x = make_rows(5, 4, torch.float32)
    labels = torch.tensor([5, 0, 0, 1, 2])
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        value = loss(x.detach().to(dtype).requires_grad_(), labels)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        value.backward()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(x, labels), loss(x.detach(), labels), rtol=0, atol=0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, labels), loss(x, labels))
    torch.compiler.reset()


def test_wrong_soft_triple_arguments():
    x, centers = make_rows(4, 3), torch.randn(2, 3, 3)
    labels = torch.tensor([0, 1, 1, 0])
    with pytest.raises(ValueError, match="labels must be classes from 0 to 1; got 2"):
        F.soft_triple_loss(x, labels * 2, centers=centers)
    with pytest.raises(ValueError, match="rows are compared with centers"):
        F.soft_triple_loss(x, labels, centers=centers, ref_emb=x, ref_labels=labels)
    with pytest.raises(ValueError, match="one class per row"):
        F.soft_triple_loss(x, multi_hot(torch.ones(4, 2)), centers=centers)
    with pytest.raises(ValueError, match="centers must have as many features"):
        F.soft_triple_loss(x, labels, centers=centers[:, :, :2])
    with pytest.raises(ValueError, match="centers must have shape"):
        F.soft_triple_loss(x, labels, centers=centers[0])
    with pytest.raises(ValueError, match="num_classes must be above 0"):
        flashmetric.SoftTripletLoss(0, 4)
