"""A sweep's table as one figure in the form of the paper's (arXiv 2404.02424): accuracy, and perplexity beside it."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sparselora_jax.jobs.table import FLOOR, Row, mean_interval
from sparselora_jax.runtime.files import whole

REFERENCES = {
    'dense': ('black', '--', 'dense'),
    FLOOR: ('gray', ':', FLOOR),
    'control': ('tab:red', '-.', 'dense, same LoRA budget'),
}


def figure(config: Any, table: list[Row]) -> Figure:
    """The figure that `config.plot` asks for.

    `config.plot`: `kind` (bars | lines), `x` and `series` (labels; `series` may be empty), `title`. Pruned models are
    drawn pale (bars) or dashed (lines), the dense model, the floor and the dense control as lines across.
    """
    drawn = [row for row in table if row.values and row.model not in REFERENCES]
    quantities = ['accuracy', *(['perplexity'] if any('perplexity' in row.values for row in drawn) else [])]
    positions = list(dict.fromkeys(_label(row, config.plot.x) for row in table if row.model not in REFERENCES))
    bars = config.plot.kind == 'bars'
    width = max(5.0, 2.0 + 0.16 * len(drawn)) if bars else 5.0
    plot = Figure(figsize=(width * len(quantities), 4.2), layout='constrained')
    for axes, quantity in zip(np.atleast_1d(plot.subplots(1, len(quantities))), quantities, strict=True):
        (_bars if bars else _lines)(axes, config.plot, drawn, positions, quantity)
        for row in table:
            if row.model in REFERENCES and quantity in row.values:
                colour, style, name = REFERENCES[row.model]
                axes.axhline(_height(row, quantity)[0], color=colour, linestyle=style, linewidth=1, label=name)
        axes.set_xticks(_places(positions) if not bars else range(len(positions)), [str(x) for x in positions])
        axes.set(xlabel=config.plot.x, ylabel='accuracy, %' if quantity == 'accuracy' else quantity)
        if quantity == 'perplexity':
            axes.set_yscale('log')
        else:
            axes.set_ylim(0, 105)
        axes.grid(axis='y', alpha=0.3)
        axes.set_axisbelow(True)
    handles, names = plot.axes[0].get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    plot.legend(unique.values(), unique.keys(), loc='outside lower center', ncols=4, fontsize='small')
    plot.suptitle(config.plot.title)
    return plot


def _label(row: Row, name: str) -> Any:
    return row.steps if name == 'steps' else row.labels[name]


def _height(row: Row, quantity: str) -> tuple[float, float]:
    """(mean, half width of its interval; 0 if there is none)."""
    mean, half = mean_interval(row.values[quantity])
    scale = 100 if quantity == 'accuracy' else 1
    return scale * mean, scale * (half or 0.0)


def _groups(plot: Any, drawn: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """(series, model) -> its rows."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in drawn:
        found.setdefault((str(row.labels[plot.series]) if plot.series else '', row.model), []).append(row)
    return found


def _pale(series: str, model: str, groups: dict[tuple[str, str], list[Row]]) -> bool:
    """Whether a pruned model is drawn beside what restoring makes of it."""
    return model == 'pruned' and (series, 'restored') in groups


def _name(series: str, model: str, groups: dict[tuple[str, str], list[Row]]) -> str:
    alone = sum(other == series for other, _ in groups) == 1
    return series if alone and series else ', '.join(filter(None, (series, model)))


def _colours(groups: dict[tuple[str, str], list[Row]]) -> dict[str, Any]:
    colours = matplotlib.colormaps['tab10'].colors
    return {name: colours[i % 10] for i, name in enumerate(dict.fromkeys(series for series, _ in groups))}


def _bars(axes: Any, plot: Any, drawn: list[Row], positions: list, quantity: str) -> None:
    groups = _groups(plot, drawn)
    colours = _colours(groups)
    width = 0.8 / max(len(groups), 1)
    for index, ((series, model), rows) in enumerate(groups.items()):
        rows = [row for row in rows if quantity in row.values]
        at = [positions.index(_label(row, plot.x)) + width * (index - (len(groups) - 1) / 2) for row in rows]
        heights, halves = zip(*(_height(row, quantity) for row in rows), strict=True) if rows else ((), ())
        style = {'color': colours[series], 'alpha': 0.4 if _pale(series, model, groups) else 1.0}
        style['label'] = _name(series, model, groups)
        axes.bar(at, heights, width, yerr=halves if any(halves) else None, capsize=2, **style)


def _places(positions: list) -> list[float]:
    """Numbers lie where they are, in powers of two where they span much; other labels side by side."""
    if not all(isinstance(x, int | float) for x in positions):
        return [float(index) for index in range(len(positions))]
    if min(positions) > 0 and max(positions) >= 16 * min(positions):
        return [float(np.log2(x)) for x in positions]
    return [float(x) for x in positions]


def _lines(axes: Any, plot: Any, drawn: list[Row], positions: list, quantity: str) -> None:
    groups, place = _groups(plot, drawn), dict(zip(positions, _places(positions), strict=True))
    colours = _colours(groups)
    for (series, model), rows in groups.items():
        rows = sorted((r for r in rows if quantity in r.values), key=lambda row: place[_label(row, plot.x)])
        heights, halves = zip(*(_height(row, quantity) for row in rows), strict=True) if rows else ((), ())
        dashes = '--' if _pale(series, model, groups) else '-'
        style = {'color': colours[series], 'linestyle': dashes, 'marker': 'o'}
        at = [place[_label(row, plot.x)] for row in rows]
        error = halves if any(halves) else None
        axes.errorbar(at, heights, error, capsize=3, label=_name(series, model, groups), **style)


def write(config: Any, table: list[Row], workdir: str | Path) -> None:
    """Writes `<name>.png` and `<name>.svg` into the workdir; the same table makes the same files."""
    with matplotlib.rc_context({'svg.hashsalt': 'sparselora'}):
        for kind, metadata in {'png': {'Software': None}, 'svg': {'Date': None}}.items():
            with whole(Path(workdir) / f'{config.name}.{kind}') as partial:
                figure(config, table).savefig(partial, format=kind, dpi=150, metadata=metadata)
