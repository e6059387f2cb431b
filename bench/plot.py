# SPDX-License-Identifier: Apache-2.0
"""Draws time and memory against the batch size, one panel per number of features."""

from pathlib import Path

from bench.contenders import BARE, CONTENDERS, OURS
from bench.suite import Row
from bench.worker import FORWARD, STEP

# Okabe-Ito: told apart with colour-blind eyes; the marker repeats what the colour says.
COLOURS = ("#000000", "#999999", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "")


def series(rows: list[Row], kernel: str, metric: str, d: int) -> dict[str, list[Row]]:
    """Rows of one panel by contender, in order of N; the bare product has no backward."""
    panel: dict[str, list[Row]] = {}
    for row in rows:
        mode = FORWARD if row.provider == BARE else STEP
        if (row.kernel, row.metric, row.d, row.mode) != (kernel, metric, d, mode):
            continue
        if row.p50 is not None and row.p50 > 0:
            panel.setdefault(row.provider, []).append(row)
    return {name: sorted(items, key=lambda row: row.n) for name, items in panel.items()}


def plot(rows: list[Row], kernel: str, metric: str, subtitle: str, path: Path) -> list[Path]:
    """Draws one figure, as PNG and as SVG.

    Args:
        rows: All rows of the run.
        kernel: Label of the cases.
        metric: ``"time"`` or ``"extra memory"``.
        subtitle: A line about the machine.
        path: File name without suffix.

    Returns:
        The files written; none if there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = {(row.n, row.d) for row in rows if row.kernel == kernel and row.metric == "time"}
    kept = [row for row in rows if (row.n, row.d) in timed]
    panels = {d: series(kept, kernel, metric, d) for d in sorted({d for _, d in timed})}
    panels = {d: panel for d, panel in panels.items() if panel}
    if not panels:
        return []
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(1.6 + 3.8 * len(panels), 5.6),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    shown: dict[str, object] = {}
    for axis, (d, panel) in zip(axes[0], panels.items(), strict=True):
        for contender, colour, marker in zip(CONTENDERS, COLOURS, MARKERS, strict=True):
            if contender.name not in panel:
                continue
            items = panel[contender.name]
            sizes = [row.n for row in items]
            ours = contender.name == OURS
            (shown[contender.name],) = axis.plot(
                sizes,
                [row.p50 for row in items],
                color=colour,
                marker=marker or "_",
                linestyle="--" if contender.name == BARE else "-",
                linewidth=2.4 if ours else 1.4,
                markersize=6 if ours else 5,
                zorder=3 if ours else 2,
            )
            if items[0].p20 is not None:
                low, high = [row.p20 for row in items], [row.p80 for row in items]
                axis.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        sizes = sorted({row.n for items in panel.values() for row in items})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [str(n) for n in sizes], rotation=45 if len(sizes) > 5 else 0)
        axis.minorticks_off()
        axis.set_title(f"D = {d}", fontsize=10)
        axis.set_xlabel("batch size N")
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    words = {"time": "time of one step, ms", "extra memory": "extra memory of one step, MiB"}
    axes[0][0].set_ylabel(words[metric])
    names = [contender.name for contender in CONTENDERS if contender.name in shown]
    labels = [f"{name} (forward only)" if name == BARE else name for name in names]
    figure.legend(
        [shown[name] for name in names],
        labels,
        loc="outside lower center",
        ncols=4 if len(panels) > 1 else 2,
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(f"{kernel}, forward + backward\n{subtitle}", fontsize=10)
    written = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    for file in written:
        # Without a date in the file, equal figures give equal bytes.
        metadata = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, dpi=150, metadata=metadata)
    pyplot.close(figure)
    return written
