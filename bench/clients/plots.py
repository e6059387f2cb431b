# SPDX-License-Identifier: Apache-2.0
"""Draws the loss curves on top of each other, and time and memory where it pays."""

from pathlib import Path
from typing import Any

from bench.clients import grid
from bench.clients.session import Comparison
from bench.clients.suite import Outcome
from bench.measure import MIB
from bench.plot import COLOURS
from bench.report import number

_DPI = 130
_COLOURS = {
    grid.PEER: COLOURS[5],
    grid.OURS: COLOURS[0],
    grid.OWN_MEMORY: COLOURS[2],
    grid.ONE_LINE: COLOURS[2],
    grid.PLAIN: COLOURS[1],
    grid.PEER_PLAIN: COLOURS[7],
    grid.TORCH: COLOURS[4],
}


def pyplot() -> Any:
    """The module, for files only; raises ImportError if it is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def comparisons_of(outcomes: list[Outcome], *sections: str) -> list[Comparison]:
    """The comparisons of some sections, in their order."""
    found = {id(o.comparison): o.comparison for o in outcomes}
    return [comparison for comparison in found.values() if comparison.section in sections]


def plot_curves(outcomes: list[Outcome], subtitle: str, path: Path) -> list[Path]:
    """A panel per training loop: a row for each library and batch size, a column for each loss.

    Args:
        outcomes: Of the run.
        subtitle: A line about the machine.
        path: File to write.

    Returns:
        The file, or none if no loop ran.
    """
    loops = comparisons_of(outcomes, grid.PML_LOOPS, grid.ST_LOOPS)
    lines = list(dict.fromkeys((c.section, c.n) for c in loops))
    if not lines:
        return []
    plt = pyplot()
    panels = [[c for c in loops if (c.section, c.n) == line] for line in lines]
    columns = max(map(len, panels))
    figure, axes = plt.subplots(
        len(lines),
        columns,
        figsize=(2.9 * columns, 2.3 * len(lines) + 1),
        squeeze=False,
        layout="constrained",
    )
    for row, mine in zip(axes, panels, strict=True):
        for axis, comparison in zip(row, mine, strict=False):
            draw_curves(axis, comparison, outcomes)
        for axis in row[len(mine) :]:
            axis.set_axis_off()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"Loss of each training step, before and after the one-line change\n{subtitle}")
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return [path]


def draw_curves(axis: Any, comparison: Comparison, outcomes: list[Outcome]) -> None:
    """One panel: the peer's curve wide and light, ours narrow on top of it."""
    mine = {o.contender.name: o for o in outcomes if o.comparison == comparison}
    styles = {
        grid.PEER: {"linewidth": 4.5, "alpha": 0.45, "color": _COLOURS[grid.PEER]},
        grid.OURS: {"linewidth": 1.2, "color": _COLOURS[grid.OURS]},
    }
    absent = []
    for name, style in styles.items():
        outcome = mine[name]
        # A handle for the legend even where there is no curve.
        losses = outcome.losses or []
        # Points alone show a curve that ended after its first step.
        marker = "o" if len(losses) == 1 else ""
        axis.plot(range(len(losses)), losses, label=name, marker=marker, **style)
        if outcome.refusal:
            absent.append(f"{name}: {short(outcome.refusal)}")
    library = "PML" if comparison.section == grid.PML_LOOPS else "ST"
    kernel = comparison.kernel.replace(", ", ",\n")
    axis.set_title(f"{library} {kernel}, N = {comparison.n}", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.locator_params(axis="x", integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    if absent:
        axis.text(0.5, 0.9, "\n".join(absent), ha="center", fontsize=7, transform=axis.transAxes)


def short(refusal: str) -> str:
    """A refusal in a few words."""
    return refusal.split(" (")[0]


def plot_gains(outcomes: list[Outcome], subtitle: str, path: Path) -> list[Path]:
    """Time and extra memory of the parts where the change pays.

    Args:
        outcomes: Of the run.
        subtitle: A line about the machine.
        path: File to write.

    Returns:
        The file, or none if none of these parts ran.
    """
    groups = comparisons_of(outcomes, grid.MEMORY, grid.CHUNKS)
    dense = comparisons_of(outcomes, grid.DENSE)
    if not groups and not dense:
        return []
    plt = pyplot()
    kernels = list(dict.fromkeys(c.kernel for c in dense))
    sections = list(dict.fromkeys(c.section for c in groups))
    names = [*sections, *kernels]
    figure, axes = plt.subplots(
        2, len(names), figsize=(max(4.8 * len(names), 7), 8.8), squeeze=False, layout="constrained"
    )
    for column, name in enumerate(names):
        for axis, metric in zip(axes[:, column], ("time", "memory"), strict=True):
            if name in sections:
                mine = [c for c in groups if c.section == name]
                draw_points(axis, mine, outcomes, metric)
            else:
                draw_lines(axis, [c for c in dense if c.kernel == name], outcomes, metric)
            axis.set_title(name if name in sections else f"{grid.DENSE}: {name}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
    figure.suptitle(f"Where it pays\n{subtitle}")
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return [path]


def figure_of(outcome: Outcome, metric: str) -> float | None:
    """Seconds of a step or MiB of extra memory."""
    if metric == "time":
        return outcome.median
    return None if outcome.extra is None else max(outcome.extra / MIB, 0.1)


LABELS = {"time": "seconds per step", "memory": "extra memory, MiB"}


def draw_points(axis: Any, mine: list[Comparison], outcomes: list[Outcome], metric: str) -> None:
    """A group of points per comparison; a contender without figures is named with the reason."""
    names = list(dict.fromkeys(c.name for comparison in mine for c in comparison.contenders))
    high = 0.8 / len(names)
    for place, name in enumerate(names):
        label: str | None = name
        for group, comparison in enumerate(mine):
            outcome = next(
                (o for o in outcomes if o.comparison == comparison and o.contender.name == name),
                None,
            )
            if outcome is None:
                continue
            at = group + (place - (len(names) - 1) / 2) * high
            value = figure_of(outcome, metric)
            if value is not None:
                # Not bars: on a logarithmic axis their length says nothing.
                axis.plot(value, at, "o", color=_COLOURS[name], label=label)
                axis.annotate(
                    number(value),
                    (value, at),
                    (6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
                label = None
            else:
                axis.text(
                    0.02,
                    at,
                    f"{name}: {short(outcome.refusal)}",
                    fontsize=7,
                    va="center",
                    transform=axis.get_yaxis_transform(),
                )
    axis.set_yticks(range(len(mine)), [c.kernel.replace(", ", ",\n") for c in mine])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    axis.set_xlabel(LABELS[metric])
    axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def draw_lines(axis: Any, mine: list[Comparison], outcomes: list[Outcome], metric: str) -> None:
    """A line per contender over N; where it ends, the reason."""
    for contender in mine[0].contenders:
        found = [
            (c.n, figure_of(o, metric), o)
            for c in mine
            for o in outcomes
            if o.comparison == c and o.contender.name == contender.name
        ]
        points = [(n, value) for n, value, _ in found if value is not None]
        if not points:
            continue
        colour = _COLOURS[contender.name]
        axis.plot(*zip(*points, strict=True), color=colour, marker="o", label=contender.name)
        refused = next((o for n, value, o in found if value is None), None)
        if refused is not None:
            axis.annotate(
                f" then {short(refused.refusal)}", points[-1], fontsize=7, color=colour, va="bottom"
            )
    sizes = sorted({c.n for c in mine})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.set_xlim(right=2.5 * sizes[-1])
    axis.set_xlabel("descriptors per view")
    axis.set_ylabel(LABELS[metric])
    axis.legend(fontsize=7, frameon=False)
