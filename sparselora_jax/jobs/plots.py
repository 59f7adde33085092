"""A sweep's table as one figure in the form of the paper's (arXiv 2404.02424): scores, and perplexity beside them."""

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from sparselora_jax import recipe
from sparselora_jax.jobs.names import CONTROL, CONTROL_TITLE, FLOOR_TITLE
from sparselora_jax.jobs.table import Row, mean_interval
from sparselora_jax.runtime.files import whole

PERPLEXITY = 'perplexity'


class Style(NamedTuple):
    """How a model is drawn that other models are compared with: as a line across."""

    colour: str
    line: str
    title: str


REFERENCES = {
    'dense': Style('black', '--', 'dense'),
    FLOOR_TITLE: Style('gray', ':', FLOOR_TITLE),
    CONTROL: Style('tab:red', '-.', CONTROL_TITLE),
}

# (series, model) -> its rows: what has one colour and one entry in the legend.
Groups = dict[tuple[str, str], list[Row]]
Label = str | int | float


def figure(config: ConfigDict, table: list[Row]) -> Figure:
    """Return the figure that `config.plot` asks for.

    Pruned models are drawn pale (bars) or dashed (lines); the dense model, the floor and the dense control as lines
    across.

    Args:
      config: a sweep. `config.plot` holds `kind` (bars | lines), `x` and `series` (labels; `series` may be empty), and
        `title`.
      table: see `table.rows`.
    """
    score = recipe.metric(config.base).title
    drawn = [row for row in table if row.values and row.model not in REFERENCES]
    quantities = [score]
    if any(PERPLEXITY in row.values for row in drawn):
        quantities.append(PERPLEXITY)
    # Positions of all rows, also of those that failed: every point has its place.
    positions = list(dict.fromkeys(_label(row, config.plot.x) for row in table if row.model not in REFERENCES))
    is_bars = config.plot.kind == 'bars'
    # Bars become thin in a figure that does not grow with their number.
    width = max(5.0, 2.0 + 0.16 * len(drawn)) if is_bars else 5.0
    plot = Figure(figsize=(width * len(quantities), 4.2), layout='constrained')
    # `subplots` returns no array for a single quantity.
    for axes, quantity in zip(np.atleast_1d(plot.subplots(1, len(quantities))), quantities, strict=True):
        draw = _bars if is_bars else _lines
        draw(axes, config.plot, drawn, positions, quantity)
        _references(axes, table, quantity)
        ticks = range(len(positions)) if is_bars else _places(positions)
        axes.set_xticks(ticks, [str(position) for position in positions])
        axes.set_xlabel(config.plot.x)
        if quantity == PERPLEXITY:
            axes.set_ylabel(PERPLEXITY)
            axes.set_yscale('log')  # a broken model's is a thousand times that of a good one
        else:
            axes.set_ylabel(f'{quantity}, %')
            axes.set_ylim(0, 105)  # room for a marker at 100 %
        axes.grid(axis='y', alpha=0.3)
        axes.set_axisbelow(True)  # the grid, or it would cross the bars
    handles, titles = plot.axes[0].get_legend_handles_labels()
    unique = dict(zip(titles, handles, strict=True))  # a reference that several points have is one entry
    plot.legend(unique.values(), unique.keys(), loc='outside lower center', ncols=4, fontsize='small')
    plot.suptitle(config.plot.title)
    return plot


def _references(axes: Axes, table: list[Row], quantity: str) -> None:
    """Draw the models that the others are compared with as lines across."""
    for row in table:
        if row.model in REFERENCES and quantity in row.values:
            style = REFERENCES[row.model]
            mean, _ = _height(row, quantity)
            axes.axhline(mean, color=style.colour, linestyle=style.line, linewidth=1, label=style.title)


def _label(row: Row, name: str) -> Label:
    """Return what a row is in a column that the plot has on its x axis."""
    return row.steps if name == 'steps' else row.labels[name]


def _height(row: Row, quantity: str) -> tuple[float, float]:
    """Return the mean and the half width of its interval, 0 if there is none; scores in percent."""
    mean, half = mean_interval(row.values[quantity])
    scale = 1 if quantity == PERPLEXITY else 100
    return scale * mean, scale * (half or 0.0)


def _groups(plot: ConfigDict, drawn: list[Row]) -> Groups:
    groups: Groups = {}
    for row in drawn:
        series = str(row.labels[plot.series]) if plot.series else ''
        groups.setdefault((series, row.model), []).append(row)
    return groups


def _is_pale(series: str, model: str, groups: Groups) -> bool:
    """Return whether this is a pruned model whose restored model is drawn too."""
    return model == 'pruned' and (series, 'restored') in groups


def _title(series: str, model: str, groups: Groups) -> str:
    """Return the entry of a group in the legend; the model is named only if its series has several."""
    is_alone = sum(other == series for other, _ in groups) == 1
    if is_alone and series:
        return series
    return f'{series}, {model}' if series else model


def _colours(groups: Groups) -> dict[str, tuple[float, float, float]]:
    """Return a colour for each series."""
    colours = matplotlib.colormaps['tab10'].colors
    # By series alone: the pruned and the restored model of a series have the same colour.
    series = dict.fromkeys(series for series, _ in groups)
    return {name: colours[index % len(colours)] for index, name in enumerate(series)}


def _heights(rows: list[Row], quantity: str) -> tuple[list[float], list[float] | None]:
    """Return the means, and the half widths of their intervals, None if no row has one."""
    pairs = [_height(row, quantity) for row in rows]
    halves = [half for _, half in pairs]
    return [mean for mean, _ in pairs], halves if any(halves) else None


def _bars(axes: Axes, plot: ConfigDict, drawn: list[Row], positions: list[Label], quantity: str) -> None:
    """Draw a bar for each row, those of one position side by side."""
    groups = _groups(plot, drawn)
    colours = _colours(groups)
    width = 0.8 / max(len(groups), 1)  # of a place of 1, so that a gap of 0.2 separates places
    for index, ((series, model), rows) in enumerate(groups.items()):
        rows = [row for row in rows if quantity in row.values]
        # The groups of a place are centred on it.
        offset = width * (index - (len(groups) - 1) / 2)
        heights, halves = _heights(rows, quantity)
        axes.bar(
            [positions.index(_label(row, plot.x)) + offset for row in rows],
            heights,
            width,
            yerr=halves,
            capsize=2,
            color=colours[series],
            alpha=0.4 if _is_pale(series, model, groups) else 1.0,
            label=_title(series, model, groups),
        )


def _places(positions: list[Label]) -> list[float]:
    """Return where labels lie on the x axis: numbers at their values, other labels side by side."""
    if not all(isinstance(position, int | float) for position in positions):
        return [float(index) for index in range(len(positions))]
    # Numbers that span much, such as ranks of 1 to 64, would lie on each other: they are drawn on a log scale.
    if min(positions) > 0 and max(positions) >= 16 * min(positions):
        return [float(np.log2(position)) for position in positions]
    return [float(position) for position in positions]


def _lines(axes: Axes, plot: ConfigDict, drawn: list[Row], positions: list[Label], quantity: str) -> None:
    """Draw a line for each series and model, from left to right."""
    groups = _groups(plot, drawn)
    colours = _colours(groups)
    place = dict(zip(positions, _places(positions), strict=True))
    for (series, model), rows in groups.items():
        rows = [row for row in rows if quantity in row.values]
        # By place, not by the order of points: a line that goes back and forth cannot be read.
        rows.sort(key=lambda row: place[_label(row, plot.x)])
        heights, halves = _heights(rows, quantity)
        axes.errorbar(
            [place[_label(row, plot.x)] for row in rows],
            heights,
            halves,
            capsize=3,
            color=colours[series],
            linestyle='--' if _is_pale(series, model, groups) else '-',
            marker='o',
            label=_title(series, model, groups),
        )


def write(config: ConfigDict, table: list[Row], workdir: str | Path) -> None:
    """Write `<name>.png` and `<name>.svg` into the workdir.

    Args:
      config: a sweep.
      table: see `table.rows`.
      workdir: folder of the sweep.
    """
    # Without dates, versions and random ids: the same table makes the same files.
    metadata = {'png': {'Software': None}, 'svg': {'Date': None}}
    with matplotlib.rc_context({'svg.hashsalt': 'sparselora'}):
        for kind in metadata:
            with whole(Path(workdir) / f'{config.name}.{kind}') as partial:
                figure(config, table).savefig(partial, format=kind, dpi=150, metadata=metadata[kind])
