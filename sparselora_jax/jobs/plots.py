"""Plot a sweep's table as one figure like those of the paper (arXiv 2404.02424): scores, and perplexity beside them."""

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from sparselora_jax import recipe
from sparselora_jax.evaluation.intervals import mean_interval
from sparselora_jax.jobs.names import CONTROL, CONTROL_TITLE, FLOOR_TITLE
from sparselora_jax.jobs.table import Row
from sparselora_jax.runtime.files import whole

PERPLEXITY = 'perplexity'


class Style(NamedTuple):
    """Style of the horizontal line of a model that other models are compared with."""

    colour: str
    line: str
    title: str


REFERENCES = {
    'dense': Style('black', '--', 'dense'),
    FLOOR_TITLE: Style('gray', ':', FLOOR_TITLE),
    CONTROL: Style('tab:red', '-.', CONTROL_TITLE),
}

# (series, model) -> its rows; each group has one colour and one entry in the legend.
Groups = dict[tuple[str, str], list[Row]]
Label = str | int | float


def figure(config: ConfigDict, table: list[Row]) -> Figure:
    """Return the figure that `config.plot` asks for.

    Pruned models are pale (bars) or dashed (lines). The dense model, the floor and the dense control are horizontal
    lines.

    Args:
      config: a sweep. `config.plot` holds `kind` (bars | lines), `x` and `series` (labels; `series` may be empty), and
        `title`.
      table: see `table.rows`.
    """
    score = recipe.metric(config.base).title
    drawn = [row for row in table if row.values and row.model not in REFERENCES]
    # Each task has a panel of its own, beside the one of the recipe's own questions.
    quantities = [score, *tasks_of(table)]
    if any(PERPLEXITY in row.values for row in drawn):
        quantities.append(PERPLEXITY)
    # Positions of all rows, including failed ones, so that every point has its place.
    positions = list(dict.fromkeys(_label(row, config.plot.x) for row in table if row.model not in REFERENCES))
    is_bars = config.plot.kind == 'bars'
    # The figure grows with the number of bars, which would otherwise become too thin.
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
            axes.set_yscale('log')  # a broken model's value may be a thousand times that of a good one
        else:
            axes.set_ylabel(f'{quantity}, %')
            # Room for a marker at 100 %. CIDEr has no such bound.
            axes.set_ylim(0, max(105, axes.get_ylim()[1]))
        axes.grid(axis='y', alpha=0.3)
        axes.set_axisbelow(True)  # draws the grid behind the bars
    handles, titles = plot.axes[0].get_legend_handles_labels()
    unique = dict(zip(titles, handles, strict=True))  # a reference shared by several points is one entry
    plot.legend(unique.values(), unique.keys(), loc='outside lower center', ncols=4, fontsize='small')
    plot.suptitle(config.plot.title)
    return plot


def _references(axes: Axes, table: list[Row], quantity: str) -> None:
    """Draw the models that the others are compared with as horizontal lines."""
    for row in table:
        if row.model in REFERENCES and quantity in row.values:
            style = REFERENCES[row.model]
            mean, _ = _height(row, quantity)
            axes.axhline(mean, color=style.colour, linestyle=style.line, linewidth=1, label=style.title)


def _label(row: Row, name: str) -> Label:
    """Return the row's label in the column that the plot uses as its x axis."""
    return row.steps if name == 'steps' else row.labels[name]


def _height(row: Row, quantity: str) -> tuple[float, float]:
    """Return the mean and the half width of its interval (0 if there is none), with scores in percent."""
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
    """Return the entry of a group in the legend, which names the model only if the series has several models."""
    is_alone = sum(other == series for other, _ in groups) == 1
    if is_alone and series:
        return series
    return f'{series}, {model}' if series else model


def _colours(groups: Groups) -> dict[str, tuple[float, float, float]]:
    """Return a colour for each series."""
    colours = matplotlib.colormaps['tab10'].colors
    # Only the series decides, so the pruned and the restored model of a series have the same colour.
    series = dict.fromkeys(series for series, _ in groups)
    return {name: colours[index % len(colours)] for index, name in enumerate(series)}


def _heights(rows: list[Row], quantity: str) -> tuple[list[float], list[float] | None]:
    """Return the means and the half widths of their intervals, or None for the latter if no row has one."""
    pairs = [_height(row, quantity) for row in rows]
    halves = [half for _, half in pairs]
    return [mean for mean, _ in pairs], halves if any(halves) else None


def _bars(axes: Axes, plot: ConfigDict, drawn: list[Row], positions: list[Label], quantity: str) -> None:
    """Draw a bar for each row; bars of the same position are side by side, centred on it."""
    groups = _groups(plot, drawn)
    colours = _colours(groups)
    width = 0.8 / max(len(groups), 1)  # positions are 1 apart, so this leaves a gap of 0.2 between them
    # The groups that have a bar at each position: not every point of a sweep has every model or series.
    present: dict[Label, list[tuple[str, str]]] = {position: [] for position in positions}
    for group, rows in groups.items():
        for position in {_label(row, plot.x) for row in rows if quantity in row.values}:
            present[position].append(group)
    for (series, model), rows in groups.items():
        rows = [row for row in rows if quantity in row.values]
        places = []
        for row in rows:
            position = _label(row, plot.x)
            beside = present[position]
            offset = beside.index((series, model)) - (len(beside) - 1) / 2
            places.append(positions.index(position) + width * offset)
        heights, halves = _heights(rows, quantity)
        axes.bar(
            places,
            heights,
            width,
            yerr=halves,
            capsize=2,
            color=colours[series],
            alpha=0.4 if _is_pale(series, model, groups) else 1.0,
            label=_title(series, model, groups),
        )
    # Room for every position, also if its bars are few or failed.
    axes.set_xlim(-0.5, len(positions) - 0.5)


def _places(positions: list[Label]) -> list[float]:
    """Return the positions of labels on the x axis: numbers at their values, other labels evenly spaced."""
    if not all(isinstance(position, int | float) for position in positions):
        return [float(index) for index in range(len(positions))]
    # Numbers with a wide range, such as ranks from 1 to 64, would overlap, so they get a log scale.
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
        # Sorted by position, so that the line does not go back and forth.
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


def tasks_of(table: list[Row]) -> list[str]:
    """Return the columns of the tasks that some model is scored on, in order.

    Args:
      table: see `table.rows`.
    """
    return list(dict.fromkeys(column for row in table for column in row.tasks))


def write(config: ConfigDict, table: list[Row], workdir: str | Path) -> None:
    """Write `<name>.png` and `<name>.svg` into the workdir.

    Args:
      config: a sweep.
      table: see `table.rows`.
      workdir: folder of the sweep.
    """
    # Without dates, versions and random ids, so that the same table gives the same files.
    metadata = {'png': {'Software': None}, 'svg': {'Date': None}}
    with matplotlib.rc_context({'svg.hashsalt': 'sparselora'}):
        for kind in metadata:
            with whole(Path(workdir) / f'{config.name}.{kind}') as partial:
                figure(config, table).savefig(partial, format=kind, dpi=150, metadata=metadata[kind])
