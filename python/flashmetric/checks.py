# SPDX-License-Identifier: Apache-2.0
"""Checks of what users pass in: each mistake has one message, here.

A message names the argument, what it should be, and what came. No check reads tensor contents on a
GPU, so none waits for the device; the contents of ``indices_tuple`` are read on the CPU only.
"""

import numbers
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from flashmetric.indices import PairIndices, TripletIndices
from flashmetric.labels import Labels
from flashmetric.ops.distance import DISTANCES
from flashmetric.ops.labels import IGNORED

EMBEDDING_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32, torch.bool)


class Batch(NamedTuple):
    """The tensors of a call, checked, plain labels as int64."""

    embeddings: Tensor
    labels: Tensor | None
    ref_emb: Tensor | None
    ref_labels: Tensor | None
    rule: str = "equal"
    """How labels are compared, see :mod:`flashmetric.ops.labels`."""


LARGEST_NUMBER = 1e18
"""Largest hyper-parameter. A product of two such is still a float32, as is one over any."""


def readable(values: Tensor) -> bool:
    """Whether a check may read the numbers: nobody waits for them, and there are some to read."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not isinstance(values, FakeTensor)


def check_number(name: str, value: object) -> None:
    """Raise unless ``value`` is a real number of a size to compute with; NumPy's scalars are."""
    if not isinstance(value, (int, float, numbers.Real)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not isinstance(value, (int, float)):
        # In the type of a NumPy scalar the bounds themselves could become infinite.
        value = float(value)
    # A comparison, because math.isfinite() does not take the symbolic numbers of torch.compile.
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value}")
    if not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
        raise ValueError(f"{name} must be at most {LARGEST_NUMBER:g} in magnitude, got {value}")


def check_positive(name: str, value: object) -> None:
    """Raise unless ``value`` is a real number above 0."""
    check_number(name, value)
    if not value > 0:  # type: ignore[operator]
        raise ValueError(f"{name} must be above 0, got {value}")
    if value < 1 / LARGEST_NUMBER:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least {1 / LARGEST_NUMBER:g}, got {value}")


def check_parameter(name: str, value: object) -> None:
    """Raise unless ``value`` is a real number or, such as a learned one, a tensor of one."""
    if not isinstance(value, Tensor):
        check_number(name, value)
        return
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {_short(value.dtype)}")
    if value.ndim:
        raise ValueError(f"{name} must be a number, got shape {tuple(value.shape)}")


def check_positive_parameter(name: str, value: object) -> None:
    """Raise unless ``value`` is a number above 0, or a tensor of one.

    On CUDA the device checks it, and nobody waits. A learned number that has become NaN passes: it
    shows in the loss.
    """
    check_parameter(name, value)
    if not isinstance(value, Tensor):
        check_positive(name, value)
    elif value.device.type == "cuda":
        torch._assert_async(~(value.detach() <= 0), f"{name} must be above 0")
    elif readable(value) and bool(value <= 0):
        raise ValueError(f"{name} must be above 0, got {value.item()}")


def check_not_negative(name: str, value: object) -> None:
    """Raise unless ``value`` is a number from 0 on, or a tensor of such; CUDA does not wait."""
    if not isinstance(value, Tensor):
        check_number(name, value)
        if value < 0:  # type: ignore[operator]
            raise ValueError(f"{name} must be at least 0, got {value}")
    elif not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {_short(value.dtype)}")
    elif value.device.type == "cuda":
        torch._assert_async((value.detach() >= 0).all(), f"{name} must be at least 0")
    elif readable(value) and not bool((value >= 0).all()):
        raise ValueError(f"{name} must be at least 0, got {value.min().item()}")


def check_count(name: str, value: object) -> None:
    """Raise unless ``value`` is an integer above 0."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is a bool."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``, which are strings or numbers."""
    # True equals 1, and a comparison with an array is an array.
    plain = isinstance(value, (str, int, float, numbers.Real))
    if not plain or isinstance(value, bool) or value not in choices:
        listed = ", ".join(map(repr, choices))
        got = repr(value) if plain or value is None else type(value).__name__
        raise ValueError(f"{name} must be one of {listed}; got {got}")


def check_distance(distance: object, normalize: object) -> None:
    """Raise unless the options that every loss shares are valid."""
    if not isinstance(getattr(distance, "kernel", None), str):
        check_choice("distance", distance, DISTANCES)
    check_flag("normalize", normalize)


def check_batch(
    embeddings: Tensor,
    labels: Tensor | Labels | None,
    ref_emb: Tensor | None,
    ref_labels: Tensor | Labels | None,
    indices_tuple: tuple[Tensor, ...] | None,
) -> Batch:
    """Raise unless the tensors of a call fit together."""
    check_rows("embeddings", embeddings)
    if ref_emb is not None:
        check_rows("ref_emb", ref_emb)
        if ref_emb.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f"ref_emb must have as many features as embeddings, {embeddings.shape[1]}; "
                f"got shape {tuple(ref_emb.shape)}"
            )
        _check_same("ref_emb", "dtype", ref_emb.dtype, embeddings.dtype)
        _check_same("ref_emb", "device", ref_emb.device, embeddings.device)
    elif ref_labels is not None:
        raise ValueError("ref_labels must come with ref_emb; got ref_labels alone")

    rule = ref_rule = "equal"
    words: Tensor | None = None
    ref_words: Tensor | None = None
    if labels is not None:
        words, rule = _check_labels("labels", labels, "embeddings", embeddings)
    elif indices_tuple is None:
        hint = "" if ref_emb is None else " (if row i belongs to row i of ref_emb: arange for both)"
        raise ValueError(f"labels must be given unless indices_tuple is; got None{hint}")
    if ref_labels is not None and ref_emb is not None:
        ref_words, ref_rule = _check_labels("ref_labels", ref_labels, "ref_emb", ref_emb)
        if words is not None and (ref_rule != rule or ref_words.shape[1:] != words.shape[1:]):
            raise ValueError(
                f"ref_labels must be of the kind of labels, {_kind(rule, words)}; "
                f"got {_kind(ref_rule, ref_words)}"
            )
    elif ref_emb is not None and indices_tuple is None:
        raise ValueError("ref_labels must be given with ref_emb unless indices_tuple is; got None")
    return Batch(embeddings, words, ref_emb, ref_words, rule)


def check_indices(
    indices_tuple: tuple[Tensor, ...], embeddings: Tensor, ref_emb: Tensor | None
) -> tuple[Tensor, ...]:
    """Raise unless ``indices_tuple`` is (anchors, positives, negatives) or (a1, p, a2, n).

    Of a result of fixed size, positives and negatives that are not valid come back as -1, which
    stands for no row, and their anchors as 0.
    """
    if isinstance(indices_tuple, (TripletIndices, PairIndices)):
        return _check_fixed_size(indices_tuple, embeddings, ref_emb)
    if not isinstance(indices_tuple, (tuple, list)):
        raise TypeError(
            f"indices_tuple must be a tuple of tensors, got {type(indices_tuple).__name__}"
        )
    if len(indices_tuple) not in (3, 4):
        raise ValueError(f"indices_tuple must hold 3 or 4 tensors, got {len(indices_tuple)}")
    anchors = (0,) if len(indices_tuple) == 3 else (0, 2)
    refs = embeddings if ref_emb is None else ref_emb
    for position, index in enumerate(indices_tuple):
        rows = (embeddings if position in anchors else refs).shape[0]
        _check_index(f"indices_tuple[{position}]", index, rows, embeddings.device)
    # A 3-tuple is a list of triplets; a 4-tuple is two lists of pairs.
    lists = ((0, 1), (0, 2)) if len(indices_tuple) == 3 else ((0, 1), (2, 3))
    for first, second in lists:
        if indices_tuple[first].shape != indices_tuple[second].shape:
            raise ValueError(
                f"indices_tuple[{second}] must be as long as indices_tuple[{first}], "
                f"{len(indices_tuple[first])}; got {len(indices_tuple[second])}"
            )
    return tuple(indices_tuple)


def _check_fixed_size(
    found: TripletIndices | PairIndices, embeddings: Tensor, ref_emb: Tensor | None
) -> TripletIndices | PairIndices:
    refs = embeddings if ref_emb is None else ref_emb
    masks: dict[str, tuple[int, ...]] = {"valid": (0, 1, 2)}
    if isinstance(found, PairIndices):
        masks = {"positive_valid": (0, 1), "negative_valid": (2, 3)}
    checked: list[Tensor] = []
    for mask_name in masks:
        mask = getattr(found, mask_name)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"indices_tuple.{mask_name} must be a bool tensor")
    if not embeddings.shape[0] or not refs.shape[0]:
        # No entry is valid, and there is no row that could stand in for one.
        found = type(found)(*(field[:0] for field in found))
    for mask_name, positions in masks.items():
        mask = getattr(found, mask_name)
        for position in positions:
            name, index = f"indices_tuple.{found._fields[position]}", found[position]
            anchors = found._fields[position].endswith("anchors")
            rows, nothing = (embeddings, 0) if anchors else (refs, -1)
            if isinstance(index, Tensor) and index.shape != mask.shape:
                raise ValueError(
                    f"{name} must be as long as its mask, {tuple(mask.shape)}; "
                    f"got {tuple(index.shape)}"
                )
            if isinstance(index, Tensor) and index.dtype == torch.int64:
                index = index.masked_fill(~mask, nothing)
            _check_index(name, index, rows.shape[0], embeddings.device, nothing)
            checked.append(index)
    return type(found)(*checked, *found[len(checked) :])


def check_rows(name: str, rows: object) -> None:
    """Raise unless ``rows`` is a dense floating-point matrix."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}")
    if rows.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {_short(rows.layout)}")
    if rows.ndim != 2:
        raise ValueError(f"{name} must have shape [rows, features], got {tuple(rows.shape)}")
    if rows.dtype not in EMBEDDING_DTYPES:
        raise TypeError(
            f"{name} must be float32, float16, bfloat16 or float64, got {_short(rows.dtype)}"
        )


def _check_same(name: str, what: str, got: object, expected: object) -> None:
    if got != expected:
        raise ValueError(
            f"{name} must have the {what} of embeddings, {_short(expected)}; got {_short(got)}"
        )


def _kind(rule: str, words: Tensor) -> str:
    return f"rule {rule!r} on {words.shape[1] if words.ndim > 1 else 1} word(s)"


def _check_labels(name: str, labels: object, rows_name: str, rows: Tensor) -> tuple[Tensor, str]:
    if isinstance(labels, Labels):
        if labels.words.shape[0] != rows.shape[0]:
            raise ValueError(
                f"{name} must be of {rows.shape[0]} rows, one per row of {rows_name}; "
                f"got {labels.words.shape[0]}"
            )
        _check_same(name, "device", labels.words.device, rows.device)
        return labels.words, labels.rule
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(labels).__name__}")
    if labels.ndim != 1 or labels.shape[0] != rows.shape[0]:
        rows_given = labels.ndim == 2 and labels.is_floating_point()
        hint = ", rows to compare with are ref_emb" if rows_given else ""
        raise ValueError(
            f"{name} must have shape [{rows.shape[0]}], one label per row of {rows_name}; "
            f"got {tuple(labels.shape)}{hint}"
        )
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"{name} must be int64, int32 or bool, got {_short(labels.dtype)}")
    _check_same(name, "device", labels.device, rows.device)
    return labels if labels.dtype == torch.int64 else labels.long(), "equal"


def _check_index(
    name: str, index: object, rows: int, device: torch.device, lowest: int = 0
) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(index).__name__}")
    if index.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(index.shape)}")
    if index.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {_short(index.dtype)}")
    _check_same(name, "device", index.device, device)
    if not readable(index) or index.numel() == 0:
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < lowest or high >= rows:
        raise ValueError(f"{name} must hold row numbers from 0 to {rows - 1}, got {low} to {high}")


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")


def check_classes(labels: Tensor, classes: int) -> None:
    """Raise unless the labels of rows that are not ignored number ``classes`` classes from 0."""
    if torch.compiler.is_compiling() or labels.numel() == 0:
        return
    wrong = ((labels < 0) | (labels >= classes)) & (labels != IGNORED)
    message = f"labels must be classes from 0 to {classes - 1}"
    if labels.device.type == "cuda":
        torch._assert_async(~wrong.any(), message)
    elif readable(labels) and bool(wrong.any()):
        raise ValueError(f"{message}; got {int(labels[wrong][0])}")
