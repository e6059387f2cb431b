# SPDX-License-Identifier: Apache-2.0
"""Draws the roofline, the speed-ups at the targets' cases, and the rates of the sweeps."""

from pathlib import Path
from typing import Any

from bench.gpu import rows as kinds
from bench.gpu.contenders import BARE, CONTENDERS, OURS
from bench.gpu.report import cells_of, keys_of
from bench.gpu.rows import Row
from bench.measure import MIB

# Okabe-Ito: told apart with colour-blind eyes; the marker repeats what the colour says.
COLOURS = ("#000000", "#666666", "#AAAAAA", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*")
STYLE = {
    name: {"color": colour, "marker": marker}
    for name, colour, marker in zip(CONTENDERS, COLOURS, MARKERS, strict=True)
}
ROOFS = {"bfloat16": "-", "float32 high": "--", "float32": ":"}
LOWEST_INTENSITY, HIGHEST_INTENSITY = 1.0, 1e6


def roofline_points(rows: list[Row]) -> list[tuple[str, str, float, float]]:
    """Contender, case, operations per byte and operations per second, where both are known."""
    points = []
    for key in keys_of(rows):
        _, kernel, precision, n, d = key
        for name, of in cells_of(rows, key).items():
            rate, time, moved = of.get(kinds.RATE), of.get(kinds.TIME), of.get(kinds.TRAFFIC)
            if rate is None or time is None or moved is None:
                continue
            if rate.p50 is None or time.p50 is None or not moved.p50:
                continue
            flops = rate.p50 * 1e12 * time.p50 / 1e3
            case = f"{kernel} {n} x {d} {precision}"
            points.append((name, case, flops / (moved.p50 * MIB), rate.p50 * 1e12))
    return points


def speedups(rows: list[Row]) -> dict[str, dict[str, float]]:
    """By case of a target group: every other contender's time over ours."""
    found: dict[str, dict[str, float]] = {}
    for key in keys_of(rows):
        group, kernel, precision, n, d = key
        if group.startswith("sweep"):
            continue
        for name, of in cells_of(rows, key).items():
            time = of.get(kinds.TIME)
            if name != OURS and time is not None and time.ratio_to_ours:
                case = f"{kernel}\n{n} x {d}, {precision}"
                found.setdefault(case, {})[name] = time.ratio_to_ours
    return found


def draw_roofline(pyplot: Any, rows: list[Row], peaks: dict[str, float], title: str) -> Any:
    """Our points and those of peers under the measured roofs; None without any point."""
    points = roofline_points(rows)
    if not points or not peaks.get("copy"):
        return None
    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    xs = [LOWEST_INTENSITY * 10 ** (i / 20) for i in range(121)]
    for name, line in ROOFS.items():
        if peaks.get(name):
            roof = [min(peaks[name], peaks["copy"] * x) / 1e12 for x in xs]
            axis.plot(xs, roof, color="#888888", linestyle=line, linewidth=1, label=f"peak, {name}")
    named = set()
    for name, _, intensity, rate in points:
        label = None if name in named else name
        named.add(name)
        x = min(max(intensity, LOWEST_INTENSITY), HIGHEST_INTENSITY)
        size = 60 if CONTENDERS[name].ours else 34
        axis.scatter(x, rate / 1e12, s=size, label=label, zorder=3, **STYLE[name])
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(LOWEST_INTENSITY, HIGHEST_INTENSITY)
    axis.set_xlabel("operations of a dense computation per byte that the operators move")
    axis.set_ylabel("effective TFLOP/s")
    axis.set_title(f"Roofline, measured peaks\n{title}", fontsize=10)
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def draw_speedups(pyplot: Any, rows: list[Row], title: str) -> Any:
    """Bars of every contender's time over ours; a bar left of 1 is one that we lose."""
    found = speedups(rows)
    if not found:
        return None
    bars = sum(len(of) for of in found.values())
    figure, axis = pyplot.subplots(
        figsize=(9, 1.6 + 0.22 * bars + 0.25 * len(found)), layout="constrained"
    )
    at, ticks, shown = 0.0, [], set()
    for case, ratios in found.items():
        begin = at
        for name, ratio in ratios.items():
            label = None if name in shown else name
            shown.add(name)
            axis.barh(at, ratio - 1, left=1, height=0.8, color=STYLE[name]["color"], label=label)
            side = "left" if ratio >= 1 else "right"
            figures = {"va": "center", "ha": side, "fontsize": 7, "annotation_clip": False}
            axis.annotate(f" {ratio:.3g} x ", (ratio, at), **figures)
            at += 1
        ticks.append(((begin + at - 1) / 2, case))
        at += 1.2
    axis.axvline(1, color="#000000", linewidth=1)
    axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.set_yticks([y for y, _ in ticks], [case for _, case in ticks], fontsize=8)
    axis.set_ylim(at - 1, -1)  # the first case on top
    axis.set_xlabel("time over flashmetric's; right of 1 flashmetric is faster")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def draw_sweep(pyplot: Any, rows: list[Row], group: str, precision: str, title: str) -> Any:
    """Time against the batch size, one panel per number of features."""
    keys = [key for key in keys_of(rows) if key[0] == group and key[2] == precision]
    dims = sorted({key[4] for key in keys})
    figure, axes = pyplot.subplots(
        1,
        len(dims),
        figsize=(1.6 + 2.8 * len(dims), 4.6),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    shown: dict[str, Any] = {}
    for axis, d in zip(axes[0], dims, strict=True):
        panel: dict[str, list[Row]] = {}
        for key in keys:
            for name, of in cells_of(rows, key).items() if key[4] == d else ():
                if of.get(kinds.TIME) is not None and of[kinds.TIME].p50:
                    panel.setdefault(name, []).append(of[kinds.TIME])
        for name, items in panel.items():
            items.sort(key=lambda row: row.n)
            (shown[name],) = axis.plot(
                [row.n for row in items],
                [row.p50 for row in items],
                linestyle="--" if name == BARE else "-",
                linewidth=2.2 if name == OURS else 1.2,
                **STYLE[name],
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"D = {d}", fontsize=10)
        axis.set_xlabel("batch size N")
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    if not shown:
        pyplot.close(figure)
        return None
    axes[0][0].set_ylabel("time of one call, ms")
    figure.legend(
        list(shown.values()), list(shown), loc="outside lower center", ncols=5, frameon=False
    )
    figure.suptitle(f"{group}, {precision}\n{title}", fontsize=10)
    return figure


def plot(
    rows: list[Row], peaks: dict[str, float], title: str, folder: Path, stem: str
) -> list[Path]:
    """Draws all figures as PNG.

    Args:
        rows: All rows of the run.
        peaks: Rates of the machine.
        title: A line about the machine, or that the figures are made up.
        folder: Where to.
        stem: Begin of the file names.

    Returns:
        The files written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = {
        "roofline": draw_roofline(pyplot, rows, peaks, title),
        "speedup": draw_speedups(pyplot, rows, title),
    }
    sweeps = dict.fromkeys((k[0], k[2]) for k in keys_of(rows) if k[0].startswith("sweep"))
    for group, precision in sweeps:
        name = f"{group}-{precision.replace(' ', '-')}"
        figures[name] = draw_sweep(pyplot, rows, group, precision, title)
    written = []
    for name, figure in figures.items():
        if figure is None:
            continue
        path = folder / f"{stem}-{name}.png"
        figure.savefig(path, dpi=140)
        pyplot.close(figure)
        written.append(path)
    return written
