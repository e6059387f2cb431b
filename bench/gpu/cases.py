# SPDX-License-Identifier: Apache-2.0
"""What is timed on a GPU: problems, sizes, precisions, and how exact each precision must be."""

from dataclasses import dataclass, replace

import torch

from bench.gpu.contenders import EVERYONE, NO_COMPILE, OURS_AND_PEERS, SWEEP

SIZES = (512, 2048, 8192, 32768)
DIMS = (64, 128, 256, 512, 1024)
GROUPS = (
    "step",
    "triplet",
    "contrastive",
    "selection",
    "memory",
    "sweep-selection",
    "sweep-contrastive",
)
FORWARD, STEP = "forward", "forward+backward"


@dataclass(frozen=True)
class Precision:
    """What a row consists of and how products of float32 may be computed.

    Attributes:
        name: As printed.
        dtype: Type of the embeddings.
        matmul: Argument of ``torch.set_float32_matmul_precision``.
        ours: Largest relative errors of our loss and of our gradient. The loss of half-precision
            rows must be as exact as that of the same rows in float32; only the gradient is rounded.
        peers: The same for the others, whose mining in half precision may choose other pairs.
    """

    name: str
    dtype: torch.dtype
    matmul: str
    ours: tuple[float, float]
    peers: tuple[float, float]


FLOAT32 = Precision("float32", torch.float32, "highest", (1e-5, 1e-4), (1e-5, 1e-4))
# Keys from ten bits of mantissa: of two nearly equal candidates either may win.
HIGH = Precision("float32 high", torch.float32, "high", (2e-3, 3e-1), (2e-3, 3e-1))
BFLOAT16 = Precision("bfloat16", torch.bfloat16, "highest", (1e-5, 1e-2), (5e-2, 1.0))
FLOAT16 = Precision("float16", torch.float16, "highest", (1e-5, 2e-3), (1e-2, 3e-1))
PRECISIONS = {p.name: p for p in (FLOAT32, HIGH, BFLOAT16, FLOAT16)}


@dataclass(frozen=True)
class GpuCase:
    """One problem at one size.

    Attributes:
        group: What ``--only`` selects by.
        kernel: ``"hardest"``, ``"triplet"`` or ``"contrastive"``.
        n: Batch size.
        d: Features per embedding.
        precision: Key of ``PRECISIONS``.
        activity: Share of active negatives, only for contrastive: ``"few"`` or ``"half"``.
        contenders: Names of those that take part.
        launches: Whether launches are counted and the device time is taken from graph replay.
    """

    group: str
    kernel: str
    n: int
    d: int
    precision: str = FLOAT32.name
    activity: str = ""
    contenders: tuple[str, ...] = NO_COMPILE
    launches: bool = False

    @property
    def label(self) -> str:
        """Name of the series the case belongs to."""
        return f"{self.kernel} ({self.activity})" if self.activity else self.kernel

    @property
    def title(self) -> str:
        """Row label."""
        return f"{self.label} N={self.n} D={self.d} {self.precision}"

    @property
    def mode(self) -> str:
        """What one call is: the selection alone, or a training step."""
        return FORWARD if self.kernel == "hardest" else STEP

    @property
    def flops(self) -> float:
        """Operations that a dense computation of the case needs, the basis of all rates.

        Mining needs one product of 2 N^2 D operations. The sum over all pairs needs two more for
        the gradients of both roles. What symmetry saves is not taken off: a rate above the peak of
        the machine would mean just that.
        """
        product = 2.0 * self.n * self.n * self.d
        return 3 * product if self.kernel == "contrastive" else product

    @property
    def embedding_bytes(self) -> int:
        """Size of the batch itself."""
        return self.n * self.d * PRECISIONS[self.precision].dtype.itemsize


def target_cases() -> list[GpuCase]:
    """The cases that targets refer to, and their neighbours in precision."""
    selection = [
        GpuCase("selection", "hardest", 32768, 256, p.name)
        for p in (BFLOAT16, FLOAT32, HIGH, FLOAT16)
    ]
    triplet = [
        GpuCase("triplet", "triplet", 8192, 512, p.name) for p in (BFLOAT16, FLOAT16, FLOAT32)
    ]
    contrastive = [
        GpuCase("contrastive", "contrastive", 8192, 128, p.name, activity)
        for p, activity in ((FLOAT32, "half"), (FLOAT32, "few"), (HIGH, "half"), (BFLOAT16, "half"))
    ]
    step = [
        GpuCase("step", "triplet", 512, 128, p.name, launches=True) for p in (FLOAT32, BFLOAT16)
    ]
    memory = [
        GpuCase("memory", kernel, 131072, 128, activity=activity, contenders=OURS_AND_PEERS)
        for kernel, activity in (("triplet", ""), ("contrastive", "few"))
    ]
    # Compiling takes seconds per size and precision, so it is compared where targets are.
    for series in (selection, triplet, contrastive, step):
        series[0] = replace(series[0], contenders=EVERYONE)
    return [*step, *triplet, *contrastive, *selection, *memory]


def sweep_cases(sizes: tuple[int, ...], dims: tuple[int, ...], full: bool) -> list[GpuCase]:
    """Selection and contrastive loss over a grid; ``full`` adds the other main precision."""
    series = [("sweep-selection", "hardest", "", (BFLOAT16, FLOAT32))]
    series += [("sweep-contrastive", "contrastive", "few", (FLOAT32, BFLOAT16))]
    cases = []
    for group, kernel, activity, precisions in series:
        for p in precisions if full else precisions[:1]:
            for n in sizes:
                cases += [GpuCase(group, kernel, n, d, p.name, activity, SWEEP) for d in dims]
    return cases


def grid(scope: str, only: list[str] | None) -> list[GpuCase]:
    """Lists the cases of a run, those with targets first.

    Args:
        scope: ``"quick"``, ``"default"`` or ``"full"``.
        only: Groups to keep; None for all.

    Returns:
        The cases in running order.
    """
    cases = target_cases()
    if scope == "quick":
        kept = {BFLOAT16.name: ("selection", "triplet"), FLOAT32.name: GROUPS}
        cases = [case for case in cases if case.group in kept.get(case.precision, ())]
        cases = [replace(case, contenders=_without_compile(case)) for case in cases]
        cases += sweep_cases((2048, 8192), (128, 512), full=False)
    else:
        cases += sweep_cases(SIZES, DIMS, full=scope == "full")
    return [case for case in cases if only is None or case.group in only]


def _without_compile(case: GpuCase) -> tuple[str, ...]:
    return tuple(name for name in case.contenders if name in NO_COMPILE)
