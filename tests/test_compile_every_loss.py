# SPDX-License-Identifier: Apache-2.0
"""Every loss in one compiled graph for all batch sizes, on fake tensors, and without waiting."""

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashmetric import checks
from loss_cases import CASES, LEARNED, PLAIN, SIZED, Case, Model, labels_of, name_of, rows

# TorchDynamo itself creates an instance of autograd.Function while it traces one.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

WAITS = {
    "LiftedStructureLoss": "counts the positives of an anchor unless max_positives is given",
    "AngularLoss": "counts the positives of an anchor unless max_positives is given",
    "TripletRatioLoss": "counts the positives of an anchor unless max_positives is given",
    "QuadrupletLoss": "counts the rows of a class unless class_size is given",
    "TripletMarginLoss-margins": "sweeps the classes that are there, one after the other",
}
FREE = [case for case in CASES if case.name not in WAITS]


def test_the_catalog_says_which_losses_wait() -> None:
    waiting = {case.name for case in PLAIN if not case.one_graph}
    assert waiting == WAITS.keys() & {case.name for case in PLAIN}


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(model: Model, run: Callable[..., Tensor], n: int) -> list[Tensor | None]:
    """Value, and the gradients of encoder and loss."""
    model.zero_grad()
    inputs = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
    value = run(inputs, labels_of(n))
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters())]


def check_compiled(case: Case, backend: str, sizes: tuple[int, ...]) -> None:
    model = Model(case)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in sizes:
            ours, expected = step(model, compiled, n), step(model, model, n)
            assert all(value is not None for value in expected)
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b)


# Of the variants those whose learned numbers take a path of their own: compiling takes seconds.
COMPILED = [
    *(case for case in (*PLAIN, *SIZED) if case.name not in WAITS),
    *(case for case in LEARNED if case.name.endswith(("InfoNCELoss-learned", "-mahalanobis"))),
]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("case", COMPILED, ids=name_of)
def test_one_graph_for_all_batch_sizes(case: Case) -> None:
    check_compiled(case, "aot_eager", (24, 36))


# Importing TorchInductor defines scripted modules.
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("SupConLoss-learned", "SoftTripletLoss")],
    ids=name_of,
)
def test_inductor(case: Case) -> None:
    check_compiled(case, "inductor", (24, 36))


def test_ops_of_learned_classes() -> None:
    ops, labels = torch.ops.flashmetric, torch.tensor([0, 2, 1, 2, -(2**63)])
    x, centers = rows(5), rows(9, seed=1).view(3, 3, -1)
    given = (centers, labels, 20.0, 10.0, 0.01)
    torch.library.opcheck(ops.class_cross_entropy.default, (x, *given))
    loss, lse = ops.class_cross_entropy(x, *given)
    torch.library.opcheck(
        ops.class_cross_entropy_backward.default, (torch.rand_like(loss), lse, x, *given)
    )
    # Columns of a larger tensor: results are contiguous, as the compiler expects.
    strided = (x.T.contiguous().T, centers.transpose(0, 1).contiguous().transpose(0, 1))
    for side in ops.class_cross_entropy_backward(loss, lse, *strided, *given[1:]):
        assert side.is_contiguous()


@pytest.mark.parametrize("case", FREE, ids=name_of)
def test_fake_tensors(case: Case) -> None:
    """Shapes and dtypes without numbers, as tools that plan memory ask for them."""
    with FakeTensorMode():
        loss, x = case.loss(), torch.empty(24, 6, dtype=torch.float16, requires_grad=True)
        value = case(loss, x, torch.empty(24, dtype=torch.int64))
        value.backward()
    assert value.shape == () and value.dtype == torch.float32
    assert x.grad is not None and x.grad.shape == x.shape and x.grad.dtype == x.dtype
    for parameter in loss.parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape


class NoWaiting(TorchDispatchMode):
    """Raises where a CUDA tensor would be waited for."""

    WAITING = (
        "aten::_local_scalar_dense",
        "aten::_unique2",
        "aten::bincount",
        "aten::equal",
        "aten::is_nonzero",
        "aten::masked_select",
        "aten::nonzero",
        "aten::unique_consecutive",
        "aten::unique_dim",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = func.name()
        masked = name in ("aten::index.Tensor", "aten::index_put_", "aten::index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        # The number of rows that it makes is that of its argument, or the sum of the repeats.
        repeats = name == "aten::repeat_interleave.Tensor"
        if masked or repeats or name.removesuffix(".default") in self.WAITING:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks as on a GPU, where they read no numbers."""
    # By its name: the package has a function of that name, too.
    labelled_pairs = importlib.import_module("flashmetric.functional.labelled_pairs")
    for module in (checks, labelled_pairs):
        monkeypatch.setattr(module, "readable", lambda _: False)


@pytest.mark.usefixtures("_no_reading")
@pytest.mark.parametrize("case", FREE, ids=name_of)
def test_nothing_waits_for_the_device(case: Case) -> None:
    loss, x = case.loss(), rows().requires_grad_()
    with NoWaiting():
        case(loss, x, labels_of()).backward()
    assert x.grad is not None and x.grad.any()


@pytest.mark.usefixtures("_no_reading")
@pytest.mark.parametrize("name", WAITS)
def test_what_waits(name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        case(case.loss(), rows().requires_grad_(), labels_of())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("case", FREE, ids=name_of)
def test_cuda_graph(case: Case) -> None:
    """Forward and backward are captured once, and replayed on other rows and labels."""
    loss, labels = case.loss().cuda(), labels_of().cuda()
    x = rows().cuda().requires_grad_()

    def forward_and_backward() -> Tensor:
        x.grad = None
        loss.zero_grad()
        value = case(loss, x, labels)
        value.backward()
        return value

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_and_backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = forward_and_backward()
    captured = [value, x.grad, *(p.grad for p in loss.parameters())]
    for seed in (1, 2):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            x.copy_(rows(seed=seed))
            labels.copy_(labels_of()[order])
        graph.replay()
        replayed = [tensor.detach().clone() for tensor in captured]
        y = x.detach().clone().requires_grad_()
        twin = case.loss().cuda()
        expected = case(twin, y, labels)
        expected.backward()
        theirs = [expected.detach(), y.grad, *(p.grad for p in twin.parameters())]
        for a, b in zip(replayed, theirs, strict=True):
            torch.testing.assert_close(a, b)
