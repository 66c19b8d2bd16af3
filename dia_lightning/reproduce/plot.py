"""The figure of a comparison."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dia_lightning.reproduce.comparison import Row
from dia_lightning.reproduce.experiment import Metric

SEEDS = "#4c78a8"
SPREAD = 0.3  # of a row's height, over which the points of the seeds are spread


def draw_comparison(title: str, rows: Mapping[Metric, Sequence[Row]]) -> Figure:
    """Draw a row per arm with the values of its seeds, their mean and its 95 % interval; a column per metric.

    Args:
        title: of the figure.
        rows: of every metric, in the same order of arms.
    """
    arms = [row.arm for row in next(iter(rows.values()))]
    width = 1.5 + 0.08 * max(map(len, arms)) + 5.0 * len(rows)
    figure = Figure(figsize=(width, 0.45 * len(arms) + 1.9), dpi=120, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
    for ax, (metric, of_metric) in zip(axes, rows.items(), strict=True):
        _draw_metric(ax, metric, of_metric)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_metric(ax: Axes, metric: Metric, rows: Sequence[Row]) -> None:
    ax.set_xlabel(metric.title)
    ax.grid(axis="x", color="#dddddd", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    labelled = False
    for height, row in enumerate(rows):
        if row.estimate is None:
            # at the left edge of the axes, whatever values the others have
            ax.text(0.02, height, row.missing, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
            continue
        steps = [SPREAD * (index / max(1, len(row.values) - 1) - 0.5) for index in range(len(row.values))]
        heights = [height + step for step in steps] if len(steps) > 1 else [height]
        points = "a seed" if not labelled else None
        mean = "mean and its 95 % interval" if not labelled else None
        labelled = True
        ax.plot(list(row.values.values()), heights, "o", color=SEEDS, alpha=0.8, markersize=5, label=points)
        low, high = row.estimate.low, row.estimate.high
        if low is not None and high is not None:  # the mean of one seed would only cover it
            error = [[row.estimate.mean - low], [high - row.estimate.mean]]
            ax.errorbar(
                row.estimate.mean, height, xerr=error, fmt="D", color="black", markersize=5, capsize=4, label=mean
            )
        if row.missing:
            ax.annotate(
                row.missing,
                (row.estimate.mean, height),
                xytext=(0, -14),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
