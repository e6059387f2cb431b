# SPDX-License-Identifier: Apache-2.0
"""Calls every op on small odd shapes: the program that compute-sanitizer watches.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m bench.gpu.sanitize

Without PyTorch's caching every tensor is an allocation of its own, so that an access behind its end
is seen. Results are only looked at as far as it takes to notice a loss that is not finite.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu.contenders import ENGINE, environment
from bench.gpu.harness import OPS

# Below, at and above tile sizes; features that are no multiple of a vector.
SHAPES = ((1, 1), (65, 33), (129, 128), (200, 67))
QUICK_SHAPES = ((7, 5), (65, 33), (129, 64))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUICK_DTYPES = (torch.float32, torch.bfloat16)
REFERENCES = 70


class Recorder(TorchDispatchMode):
    """Notes which ops of the library are called."""

    def __init__(self) -> None:
        """Starts with none."""
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        """Runs the op."""
        if func.namespace == "flashmetric":
            self.ops.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def batches(
    shapes: tuple[tuple[int, int], ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yields rows with labels and references with labels; leaves, and one of them with strides."""
    generator = torch.Generator().manual_seed(0)
    for n, d in shapes:
        for dtype in dtypes:
            x = torch.randn(n, 2 * d, generator=generator).to(device, dtype)[:, ::2]
            ref = torch.randn(REFERENCES, d, generator=generator).to(device, dtype)
            # A class of one row, a large class, and classes of a few.
            labels = (torch.arange(n) % max(n // 4, 1)).to(device)
            ref_labels = (torch.arange(REFERENCES) // 30).to(device)
            yield x, labels, ref, ref_labels


def losses(x: Tensor, labels: Tensor, ref: Tensor, ref_labels: Tensor) -> None:
    """Every op through the losses, with references and without, forward and backward."""
    import flashmetric

    for options in (
        {"distance": "euclidean"},
        {"distance": "dot", "smooth": True},
        {"distance": "cosine", "reduction": "none"},
        {"distance": "sqeuclidean", "swap": True},
    ):
        step(flashmetric.TripletMarginLoss(**options), x, labels, ref, ref_labels)
    for options in (
        {"neg_margin": 8.0},
        {"neg_margin": 0.5, "distance": "cosine", "power": 2},
        {"neg_margin": 8.0, "reduction": "none"},
    ):
        step(flashmetric.ContrastiveLoss(**options), x, labels, ref, ref_labels)


def step(loss: Any, x: Tensor, labels: Tensor, ref: Tensor, ref_labels: Tensor) -> None:
    """A training step of the batch against itself, and one against references."""
    for with_ref in (False, True):
        query = x.detach().requires_grad_()
        bank = ref.detach().requires_grad_()
        more = {"ref_emb": bank, "ref_labels": ref_labels} if with_ref else {}
        total = loss(query, labels, **more).sum()
        total.backward()
        if not bool(total.isfinite()):
            raise RuntimeError(f"{loss}, {tuple(x.shape)}, {x.dtype}: loss {float(total)}")


def raw(x: Tensor, labels: Tensor, ref: Tensor, ref_labels: Tensor) -> None:
    """Every op by its own name, also with the arguments that the losses above do not vary."""
    ops = torch.ops.flashmetric
    for r, r_labels in ((None, None), (ref, ref_labels)):
        for exact in (True, False):
            index, _ = ops.hardest(x, labels, r, r_labels, "euclidean", exact)
        options = ("euclidean", 0.2, False, "mean", False)
        loss, found, far, slope, scale = ops.hardest_triplets(x, labels, r, r_labels, *options)
        one = torch.ones_like(loss)
        ops.hardest_triplets_backward(one, slope, scale, x, r, found, far, "euclidean")
        value = ops.pair_distance(x, r, None, index, "euclidean")
        ops.pair_distance_backward(torch.ones_like(value), x, r, None, index, value, "euclidean")
        for distance in ("euclidean", "cityblock"):
            rows(x, (x, labels, r, r_labels, "equal", distance))


def rows(x: Tensor, pairs: tuple[Any, ...]) -> None:
    """The ops that reduce the pairs of every row; ``pairs`` are their leading arguments."""
    ops, n = torch.ops.flashmetric, len(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, offset = torch.tensor([[[1.0], [-1.0]], [[0.0], [4.0]]], dtype=wide, device=x.device)
    bound = torch.tensor([[0.5], [9.0]], dtype=wide, device=x.device).repeat(1, n)
    ones = torch.ones_like(bound)
    for limit in (None, bound):
        terms = ("hinge", "softplus", scale, offset, limit)
        for with_grad in (False, True):
            ops.row_sum(*pairs, *terms, with_grad)
        ops.row_sum_backward(ones, *pairs, *terms)
        logits = ("affine", "circle", scale, offset, limit, 0.25)
        lse, _, _, ref_lse, _, _ = ops.row_lse(
            *pairs, *logits, pairs[2] is not None and limit is None
        )
        sides = (None, None)
        if ref_lse.shape[1] > 0:
            sides = torch.ones_like(ref_lse), ref_lse
        ops.row_lse_backward(ones, lse, *sides, *pairs, *logits)
    thresholds = torch.arange(1.0, 4.0, device=x.device).repeat(n, 1)
    doubles = thresholds.double()
    ops.threshold_sum(*pairs, "negative", "hinge", doubles)
    ops.threshold_sum_backward(torch.ones_like(doubles), *pairs, "negative", "hinge", doubles)
    ops.nearest_beyond(*pairs, "negative", False, thresholds.to(wide))
    ops.row_top_k(*pairs, "negative", 3, False)


def main(arguments: list[str] | None = None) -> int:
    """Calls everything; returns 1 if an op of the library was left out."""
    parser = argparse.ArgumentParser("bench.gpu.sanitize", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and dtypes")
    parser.add_argument("--engines", nargs="+", default=["", "slab", "tile"], metavar="NAME")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    shapes = QUICK_SHAPES if options.quick else SHAPES
    dtypes = QUICK_DTYPES if options.quick else DTYPES
    count = 0
    with Recorder() as recorder:
        for engine in options.engines:
            with environment({ENGINE: engine} if engine else {}):
                for batch in batches(shapes, dtypes, device):
                    losses(*batch)
                    raw(*batch)
                    count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    left_out = [op for op in OPS if op not in recorder.ops]
    print(f"sanitize: {count} batches on {device}, ops called: {', '.join(sorted(recorder.ops))}")
    if left_out:
        print(f"sanitize: not called, or not in this build: {', '.join(left_out)}")
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
