# SPDX-License-Identifier: Apache-2.0
"""Options of the job, and which of them a resumed run takes from its checkpoint."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from flashmetric.demo.errors import DemoError

# Beside --resume only what does not change the training already done.
_FREE_ON_RESUME = {"data", "epochs", "output", "threads", "compare", "compare_size", "resume"}
_QUICK = {"epochs": 4, "steps": 10, "compare_size": 512}


@dataclass(frozen=True)
class Options:
    """Everything a run can be told; see ``--help`` for the meaning."""

    loss: Literal["triplet", "contrastive"] = "triplet"
    data: str | None = None
    open_set: bool = False
    epochs: int | None = None
    steps: int | None = None
    classes: int | None = None
    images: int = 12
    margin: float | None = None
    dim: int = 64
    lr: float = 3e-3
    seed: int = 0
    threads: int | None = None
    output: str = "flashmetric-demo"
    resume: str | None = None
    quick: bool = False
    compare: bool = True
    compare_size: int = 8192

    @property
    def effective_margin(self) -> float:
        """The margin of the loss: 0.2 for triplets and 1.0 for pairs unless given."""
        if self.margin is not None:
            return self.margin
        return 0.2 if self.loss == "triplet" else 1.0

    @property
    def effective_epochs(self) -> int:
        """The number of epochs: 30 on the small digits and 2 on IDX files unless given."""
        if self.epochs is not None:
            return self.epochs
        return 30 if self.data is None else 2

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values for a checkpoint."""
        return asdict(self)


def parse_options(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the command line.

    Returns:
        Only the options that were given, by the names of :class:`Options`.
    """
    given = vars(_parser().parse_args(argv))
    if "batch" in given:
        given["classes"], given["images"] = given.pop("batch")
    return given


def combine(given: dict[str, Any], saved: dict[str, Any] | None) -> Options:
    """Merge given options with the defaults, or with those of the checkpoint to resume.

    Raises:
        DemoError: If a given option contradicts the checkpoint, or the checkpoint's options are
            not those of this version.
    """
    if saved is None:
        return Options(**({**_QUICK, **given} if given.get("quick") else given))
    unknown = set(saved) ^ {field.name for field in fields(Options)}
    if unknown:
        raise DemoError(f"--resume: the checkpoint is of another version ({min(unknown)})")
    for name in given.keys() - _FREE_ON_RESUME:
        if given[name] != saved[name]:
            raise DemoError(
                f"--resume: {name}={given[name]} contradicts {name}={saved[name]} "
                "of the checkpoint; leave it out"
            )
    folder = str(Path(given["resume"]).parent)
    return Options(**{**saved, "threads": None, "output": folder, **given})


def _parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m flashmetric train",
        description="Train an embedding of handwritten digits and report what it learned.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "--data",
        metavar="DIR",
        help="folder with the IDX files of MNIST or Fashion-MNIST, plain or .gz "
        "(default: scikit-learn's digits); scripts/get-data.sh fetches them",
    )
    add(
        "--open-set",
        action="store_true",
        help="keep the three highest classes out of training and judge on them alone; with so "
        "few classes to learn from, MNIST gains less and the small digits even lose",
    )
    add("--loss", choices=("triplet", "contrastive"), help=f"default: {default.loss}")
    add("--margin", type=_positive_float, help="default: 0.2 for triplet, 1.0 for contrastive")
    add("--epochs", type=_positive_int, help="default: 30, or 2 with --data")
    add("--steps", type=_positive_int, help="batches in an epoch (default: one pass)")
    add(
        "--batch",
        type=_batch,
        metavar="PxK",
        help="P classes with K images each (default: 12 images each of all classes, at most 10)",
    )
    add("--dim", type=_positive_int, help=f"features of an embedding (default: {default.dim})")
    add("--lr", type=_positive_float, help=f"learning rate (default: {default.lr})")
    add("--seed", type=_seed, help=f"default: {default.seed}")
    add("--threads", type=_positive_int, help="CPU threads (default: PyTorch's choice)")
    add("--output", metavar="DIR", help=f"folder for the results (default: ./{default.output})")
    add("--resume", metavar="CHECKPOINT", help="continue the run that wrote this file")
    add("--quick", action="store_true", help="a short run of a few seconds, for CI")
    add(
        "--no-compare",
        action="store_false",
        dest="compare",
        help="leave out the timing against plain PyTorch",
    )
    add(
        "--compare-size",
        type=_positive_int,
        metavar="N",
        help=f"rows of the large batch in that timing (default: {default.compare_size}, "
        "where plain PyTorch needs 2 GB)",
    )
    return parser


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2147483647, got {text}")
    return value


def _batch(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    classes, images = map(int, match.groups()) if match else (0, 0)
    if classes < 2 or images < 2:
        raise argparse.ArgumentTypeError(
            f"expected PxK with P and K of at least 2, such as 10x12, got {text}"
        )
    return classes, images


def output_folder(options: Options) -> Path:
    """Create the output folder now rather than after the training.

    Raises:
        DemoError: If it cannot be created.
    """
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DemoError(f"--output {folder}: {error.strerror or error}") from error
    return folder
