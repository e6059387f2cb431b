# SPDX-License-Identifier: Apache-2.0
"""Picture of the held-out embeddings in two dimensions, before and after training."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmetric.demo.errors import optional_module
from flashmetric.demo.evaluation import Scores
from flashmetric.demo.storage import write_atomically

_MAX_POINTS = 3000
_INK = "#22262b"


def principal_plane(embeddings: Tensor) -> tuple[Tensor, list[float]]:
    """Project rows [N, D] on their first two principal components.

    Returns:
        Coordinates [N, 2] and the share of the variance that each axis holds.
    """
    centred = (embeddings - embeddings.mean(0)).double()
    _, spread, axes = torch.linalg.svd(centred, full_matrices=False)
    share = spread.square() / spread.square().sum().clamp(min=1e-300)
    return centred @ axes[:2].T, share[:2].tolist()


def plot_embeddings(
    path: Path, title: str, labels: Tensor, panels: list[tuple[str, Tensor, Scores]]
) -> None:
    """Draw one scatter plot for each panel, with a colour for each class.

    Args:
        path: The PNG to write.
        title: Title above all panels.
        labels: Labels [N] of the rows.
        panels: Name, embeddings [N, D] and scores of each panel, from left to right.
    """
    figure_module = optional_module("matplotlib.figure")
    agg = optional_module("matplotlib.backends.backend_agg")
    colours = optional_module("matplotlib").colormaps["tab10"]
    figure = figure_module.Figure(figsize=(5.6 * len(panels) + 0.9, 6.0), dpi=130)
    agg.FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    classes = sorted(set(labels.tolist()))
    # A plot of every row of a large set would be a blot.
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:_MAX_POINTS]
    for axis, (name, embeddings, scores) in zip(axes, panels, strict=True):
        points, share = principal_plane(embeddings)
        points, shown = points[chosen], labels[chosen]
        for position, label in enumerate(classes):
            members = points[shown == label]
            colour = colours(position % 10)
            x, y = members.T.tolist()
            axis.scatter(x, y, s=14, color=colour, alpha=0.65, linewidths=0, label=str(label))
            _mark_class(axis, members, str(label), colour)
        _dress(
            axis, f"{name}\nRecall@1 {scores.recall_at_1:.3f}    MAP@R {scores.map_at_r:.3f}", share
        )
    handles, names = axes[0].get_legend_handles_labels()
    legend = figure.legend(
        handles, names, title="class", loc="center right", frameon=False, markerscale=1.8
    )
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    figure.suptitle(title, color=_INK, fontsize=14, fontweight="bold", x=0.03, ha="left")
    figure.tight_layout(rect=(0, 0, 1 - 0.7 / figure.get_figwidth(), 0.98))
    write_atomically(path, lambda stream: figure.savefig(stream, format="png"))


def _mark_class(axis: Any, members: Tensor, name: str, colour: Any) -> None:
    x, y = members.median(0).values.tolist()
    box = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": colour, "alpha": 0.9}
    axis.annotate(
        name, (x, y), color=_INK, fontsize=10, ha="center", va="center", bbox=box, zorder=5
    )


def _dress(axis: Any, title: str, share: list[float]) -> None:
    axis.set_title(title, color=_INK, fontsize=12, loc="left")
    axis.set_xlabel(f"first principal component ({share[0]:.0%} of the variance)", color=_INK)
    axis.set_ylabel(f"second ({share[1]:.0%})", color=_INK)
    axis.set_aspect("equal", adjustable="datalim")
    axis.tick_params(colors="#8a9099", labelsize=8)
    axis.grid(color="#e8eaed", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_color("#d0d4d9")
