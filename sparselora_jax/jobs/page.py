"""Render a run's report as one self-contained HTML page, from the template `templates/report.html.jinja`."""

import base64
import io
import json
import shlex
from dataclasses import dataclass

import jinja2
import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from sparselora_jax import recipe
from sparselora_jax.evaluation import task_runs
from sparselora_jax.jobs import environment, names
from sparselora_jax.jobs.job import Job
from sparselora_jax.jobs.names import PACKED
from sparselora_jax.recipe import CONFIG_FILE
from sparselora_jax.sparse.rules import name_in_block, stack_of

EXAMPLES = 12  # questions that the page shows
LARGEST_PICTURE = (160, 160)  # pixels
BASELINES = {'image_blind': names.FLOOR_TITLE, 'dense_control': names.CONTROL_TITLE}  # key in the report -> title
# Name in the log -> title.
LOSSES = {'loss': 'loss', 'ce': 'cross-entropy', 'kl': 'KL to the dense model'}
FIGURE = (4.4, 2.8)  # inches; small, so that a phone does not shrink the text much
SAME_DENSITY = 0.002  # densities that differ by less are shown as one

# Autoescape, because questions, answers and paths come from users: a variable is always text, unless the template says
# `safe`.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader('sparselora_jax.jobs'), autoescape=True, undefined=jinja2.StrictUndefined
)


@dataclass(frozen=True)
class Table:
    """A table of the page: its column names and its rows."""

    head: list[str]
    rows: list[list]


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question of the page."""

    model: str
    text: str
    is_right: bool


@dataclass(frozen=True)
class Example:
    """A question of the page; `picture` is a data URL."""

    picture: str
    question: str
    true: str
    answers: list[Answer]


@dataclass(frozen=True)
class Card:
    """A figure of the first screen, with lines that explain it."""

    title: str
    figure: str
    lines: list[str]


@dataclass(frozen=True)
class Densities:
    """Density of each stack of blocks: a plot where layers differ, otherwise a sentence."""

    sentences: list[str]
    pictures: list[str]


@dataclass(frozen=True)
class Tasks:
    """The scores of all models in the tasks of a recipe."""

    scores: Table
    differences: Table
    picture: str
    notes: list[str]
    values: list[tuple[str, Table]]


@dataclass(frozen=True)
class Command:
    """A command that repeats the run or continues from it."""

    purpose: str
    line: str


def render(job: Job, report: dict) -> str:
    """Return the page: scores, sparsity, size and speed first, then plots, answers, costs, versions, commands, config.

    Args:
      job: a finished run.
      report: see `report.build`.
    """
    metric = report['metric']
    return _TEMPLATES.get_template('report.html.jinja').render(
        title=job.workdir.name,
        heading=f'{job.workdir.name}: pruned, restored, exported',
        conditions=_conditions(report),
        verdict=_verdict(report),
        scores=_score_cards(report),
        facts=_fact_cards(report),
        intervals_note=_intervals_note(report),
        metric=_capitalised(metric),
        differences=_differences(report),
        tasks=_tasks(report),
        by_kind=_scores_by_kind(report),
        sparsity=_sparsity(report),
        merged_density=_merged_density(report),
        densities=_densities(job),
        curves=_curves(job),
        examples=_examples(job),
        costs=_costs(report),
        versions=_versions(report),
        commands=_commands(job),
        config=json.dumps(report['config'], indent=1),
    )


def _capitalised(text: str) -> str:
    # `str.capitalize` would make the other letters small.
    return text[:1].upper() + text[1:]


def _conditions(report: dict) -> str:
    """Return what was run, and where."""
    # The config of the run is in the report as JSON.
    beams = report['config']['evaluate']['num_beams']
    decoding = 'greedily' if beams == 1 else f'with {beams} beams'
    line = environment.header(report['environments'][-1])
    return f'{report["questions"]} test questions, answers generated {decoding}. {line}.'


def _verdict(report: dict) -> str:
    """Return the result in one sentence or two."""
    if any(counts['violations'] for counts in report['sparsity'].values()):
        return 'The exported model breaks its pattern: do not use it. See the violations below.'
    won_back = report['won_back']
    metric = report['metric']
    if won_back is None:
        return f'Pruning lost no {metric}, so there was nothing to win back.'
    low, high = report['intervals']['restored - dense']
    sentence = f'Won back: {won_back:.0%} of the {metric} that pruning lost.'
    if low > 0:
        return f'{sentence} The restored model is better than the dense one.'
    if high < 0:
        return f'{sentence} The restored model is still worse than the dense one.'
    return f'{sentence} These questions are too few, or the models too alike, to say which of the two is better.'


def _score_cards(report: dict) -> list[Card]:
    cards = []
    for name in names.MODELS:
        low, high = report['score_intervals'][name]
        lines = [f'{low:.1%} to {high:.1%}']
        if name in report['perplexity']:  # only a decoder-only language tower has one
            line = f'perplexity {_figures(report["perplexity"][name])}'
            if name in report['perplexity_intervals']:
                low, high = report['perplexity_intervals'][name]
                line += f' ({_figures(low)} to {_figures(high)})'
            lines.append(line)
        cards.append(Card(f'{name}, {report["metric"]}', f'{report["scores"][name]:.1%}', lines))
    return cards


def _figures(value: float) -> str:
    """Return a number with at most one digit after the point, which large ones do not need."""
    return f'{value:.1f}' if value < 100 else f'{value:,.0f}'


def _fact_cards(report: dict) -> list[Card]:
    pruned = {name: counts for name, counts in report['sparsity'].items() if counts['pattern'] != 'dense'}
    weights = sum(counts['weights'] for counts in report['sparsity'].values())
    zeros = sum(round(counts['weights'] * (1 - counts['density'])) for counts in pruned.values())
    violations = sum(counts['violations'] for counts in pruned.values())
    patterns = [f'{name} {counts["pattern"]}' for name, counts in pruned.items()]
    sparsity = Card(
        'zeros in the blocks',
        f'{zeros / weights:.1%}',
        [', '.join(patterns) or 'no tower was pruned', f'{violations} groups break the pattern'],
    )
    size = report['bytes']
    packed = [f'{name}: {_megabytes(size[name])}' for name in PACKED if name in size]
    files = Card(
        'exported files',
        _megabytes(size['exported']),
        [f'dense: {_megabytes(size["dense"])}; zeros are stored', *packed],
    )
    times = report['time_s']
    speed = Card(
        'a restoration step',
        f'{report["step_s"]:.2f} s',
        [f'pruning {_duration(times["prune"])}', f'all stages {_duration(sum(times.values()))}'],
    )
    memory = Card('peak memory', f'{report["peak_memory_bytes"] / 2**30:.2f} GiB', ['of the host process'])
    return [sparsity, files, speed, memory]


def _megabytes(size: int) -> str:
    return f'{size / 1e6:,.0f} MB' if size >= 1e7 else f'{size / 1e6:.2f} MB'


def _duration(seconds: float) -> str:
    return f'{seconds:.0f} s' if seconds < 120 else f'{seconds / 60:.1f} min'


def _intervals_note(report: dict) -> str:
    """Return what the intervals are."""
    note = 'Ranges are 95 % intervals over the test questions.'
    if report['perplexity_intervals']:
        note += (
            ' Perplexity tells how badly the language model predicts one page of text: lower is better. Its intervals '
            'are over the windows of that page, by the t distribution: they say nothing of other texts.'
        )
    return note


def _differences(report: dict) -> Table:
    head = ['models', f'{report["metric"]}, points', '95 % interval, paired']
    has_ratios = bool(report['perplexity_ratios'])
    if has_ratios:
        head += ['perplexity', '95 % interval, paired']
    rows = []
    for name, (low, high) in report['intervals'].items():
        first, second = name.split(' - ')
        difference = report['scores'][first] - report['scores'][second]
        row = [f'{first} against {second}', f'{100 * difference:+.1f}', f'{100 * low:+.1f} to {100 * high:+.1f}']
        if has_ratios:
            ratio = report['perplexity_ratios'][name]
            low, high = ratio['interval']
            row += [f'x {_ratio(ratio["ratio"])}', f'x {_ratio(low)} to {_ratio(high)}']
        rows.append(row)
    return Table(head, rows)


def _ratio(value: float) -> str:
    """Return a ratio with three digits, without an exponent."""
    return f'{value:.2f}' if value < 10 else _figures(value)


def _scores_by_kind(report: dict) -> Table:
    # Baselines are rows like models, but the recipe decides which of them exist.
    by_model = {name: report['scores_by_kind'][name] for name in names.MODELS}
    by_baseline = {name: report['baselines'][key] for key, name in BASELINES.items() if key in report['baselines']}
    kinds = list(by_model['dense'])
    rows = [[name, *(f'{scores[kind]:.1%}' for kind in kinds)] for name, scores in (by_model | by_baseline).items()]
    return Table(['model', *kinds], rows)


def _tasks(report: dict) -> Tasks | None:
    """Return the part about tasks, or None if the recipe names none."""
    if not report['tasks']:
        return None
    tasks = {names.task_title(name): task for name, task in report['tasks'].items()}
    models = list(next(iter(tasks.values()))['scores'])
    scores = [
        [name, task['headline'], *(_task_score(task, model) for model in models), _items(task)]
        for name, task in tasks.items()
    ]
    notes = [f'{name}: {note}' for name, task in tasks.items() for note in task['notes']]
    return Tasks(
        scores=Table(['task', 'value', *models, 'items'], scores),
        differences=_task_differences(tasks),
        picture=_task_bars(tasks),
        notes=notes,
        values=[(name, _task_values(task)) for name, task in tasks.items() if any(task['values'].values())],
    )


def _task_score(task: dict, model: str) -> str:
    """Return a model's headline with its standard error."""
    return task_runs.score_text(task['scores'][model], task['stderr'][model])


def _items(task: dict) -> str:
    """Return how many items were scored, and of how many if these are fewer."""
    expected = task['expected']
    is_whole = expected is None or expected == task['items']
    return f'{task["items"]:,}' if is_whole else f'{task["items"]:,} of {expected:,}'


def _task_differences(tasks: dict[str, dict]) -> Table:
    """Return the difference of each pair of models in each task, with its paired interval, and what was won back."""
    pairs = list(dict.fromkeys(pair for task in tasks.values() for pair in task['intervals']))
    rows = []
    for name, task in tasks.items():
        # A test split is scored by a server.
        if not task['intervals']:
            continue
        row = [name]
        for pair in pairs:
            if pair not in task['intervals']:
                row.append('')
                continue
            first, second = pair.split(' - ')
            difference = task['scores'][first] - task['scores'][second]
            low, high = task['intervals'][pair]
            row.append(f'{difference:+.2f} ({low:+.2f} to {high:+.2f})')
        row.append('' if task['won_back'] is None else f'{task["won_back"]:.0%}')
        rows.append(row)
    return Table(['task', *(pair.replace(' - ', ' against ') for pair in pairs), 'won back'], rows)


def _task_values(task: dict) -> Table:
    """Return every value of a task, by model."""
    models = list(task['values'])
    value_names = dict.fromkeys(name for values in task['values'].values() for name in values)
    rows = []
    for name in value_names:
        values = [task['values'][model].get(name) for model in models]
        rows.append([name, *('none' if value is None else f'{value:.2f}' for value in values)])
    return Table(['value', *models], rows)


def _task_bars(tasks: dict[str, dict]) -> str:
    """Plot the headline of each task for each model, with 95 % intervals; '' if nothing is scored."""
    scored = {name: task for name, task in tasks.items() if any(score is not None for score in task['scores'].values())}
    if not scored:
        return ''
    models = list(next(iter(scored.values()))['scores'])
    height = 0.8 / len(models)
    figure = Figure(figsize=(FIGURE[0], 0.9 + 0.22 * len(models) * len(scored)))
    axes = figure.subplots()
    for place, model in enumerate(models):
        # Not every model need have a score in every task.
        rows = [row for row, task in enumerate(scored.values()) if task['scores'][model] is not None]
        shown = [list(scored.values())[row] for row in rows]
        axes.barh(
            [row + height * (place - (len(models) - 1) / 2) for row in rows],
            [task['scores'][model] for task in shown],
            height,
            xerr=[1.96 * (task['stderr'][model] or 0.0) for task in shown],
            capsize=2,
            label=model,
        )
    axes.set_yticks(range(len(scored)), [f'{name}\n{task["headline"]}' for name, task in scored.items()])
    axes.tick_params(axis='y', labelsize='small')
    axes.invert_yaxis()  # the first task on top
    axes.grid(axis='x', alpha=0.3)
    axes.set_axisbelow(True)  # draws the grid behind the bars
    axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1.0), ncols=len(models), fontsize='small', frameon=False)
    return _svg(figure)


def _sparsity(report: dict) -> Table:
    rows = [
        [tower, counts['pattern'], f'{counts["weights"]:,}', f'{counts["density"]:.4f}', counts['violations']]
        for tower, counts in report['sparsity'].items()
    ]
    return Table(['tower', 'pattern', 'weights in blocks', 'density', 'violations'], rows)


def _merged_density(report: dict) -> str:
    density = report['baselines'].get('lora_merged_density')
    if density is None:
        return 'The pruned kernels themselves were trained, under their masks.'
    return (
        'Merged as plain LoRA is, outside the mask, these factors would leave the pruned kernels at density '
        f'{density:.3f}.'
    )


def _costs(report: dict) -> Table:
    rows = [[stage, _duration(seconds)] for stage, seconds in report['time_s'].items()]
    rows.append(['one restoration step (median)', f'{report["step_s"]:.2f} s'])
    rows.append(['peak memory', f'{report["peak_memory_bytes"] / 2**30:.2f} GiB'])
    rows += [[f'size, {name}', _megabytes(size)] for name, size in report['bytes'].items()]
    return Table(['what', 'cost'], rows)


def _versions(report: dict) -> Table:
    """Return a column for everything that computed a stage: a run may have been resumed elsewhere."""
    environments = report['environments']
    rows = [
        ['devices', *(environment.devices(each) for each in environments)],
        ['mesh', *(environment.mesh(each) for each in environments)],
        ['dtype', *(each['dtype'] for each in environments)],
    ]
    rows += [[name, *(each['versions'].get(name, '') for each in environments)] for name in report['versions']]
    head = ['this run'] if len(environments) == 1 else [f'part {index + 1}' for index in range(len(environments))]
    return Table(['', *head], rows)


def _commands(job: Job) -> list[Command]:
    """Return the commands that repeat a run and use what it has left."""
    # Absolute, because the page does not tell from which folder the run was started.
    folder = job.workdir.absolute()
    workdir = shlex.quote(str(folder))
    recipe_file = f'--config={shlex.quote(str(folder / CONFIG_FILE))}'
    return [
        Command('Repeat this run:', f'python launch/train.py {recipe_file} --workdir=NEW_FOLDER'),
        Command(
            'Write the pruned model before restoration, the base of the adapter, into pruned/:',
            f'python launch/prune.py {recipe_file} --workdir={workdir}',
        ),
        Command(
            'Export without the zeros:',
            f'python launch/export.py {recipe_file} --workdir={workdir} --format=packed',
        ),
    ]


def _svg(figure: Figure) -> str:
    """Return a figure as an SVG element."""
    file = io.StringIO()
    # A fixed salt for the element ids and no date, so that the same run writes the same page.
    with matplotlib.rc_context({'svg.hashsalt': 'sparselora'}):
        figure.savefig(file, format='svg', bbox_inches='tight', metadata={'Date': None})
    text = file.getvalue()
    # Remove the XML declaration and the doctype, which are not allowed inside a page. The template may mark the result
    # as safe, because matplotlib escapes the text that it draws.
    return text[text.index('<svg') :]


def _curves(job: Job) -> str:
    """Plot the losses of restoration."""
    # `Figure` instead of pyplot: it needs no display and leaves no global state.
    figure = Figure(figsize=FIGURE)
    axes = figure.subplots()
    for name, title in LOSSES.items():
        points = job.log.curve(names.TRAINING['restored'], name)
        if points:  # there is no 'kl' without a teacher
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=title)
    axes.set(xlabel='step', yscale='log')
    # A log axis of less than a decade would have no label at all, or many in powers of ten.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter('')
    axes.xaxis.get_major_locator().set_params(integer=True)  # no step 2.5
    axes.grid(alpha=0.3)
    if not axes.lines:
        # The log was deleted or damaged; `Log` says so.
        axes.set_title('no records of the training', fontsize='small')
        return _svg(figure)
    # Above the plot, where it hides no line.
    axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1.0), ncols=len(LOSSES), fontsize='small', frameon=False)
    return _svg(figure)


def _densities(job: Job) -> Densities:
    """Return a plot for each stack of blocks whose layers differ, and a sentence for each of the others."""
    layer_density = job.read_result(names.EXPORT)['layer_density']
    stacks: dict[str, dict[str, list[float]]] = {}  # a tower may hold two, an encoder and a decoder
    for kernels in layer_density.values():
        for path, layers in kernels.items():
            name = name_in_block(path).removesuffix('/kernel')
            stacks.setdefault(stack_of(path), {})[name] = layers
    differing = {stack: kernels for stack, kernels in stacks.items() if _layers_differ(kernels)}
    sentences = [
        _density_sentence(stack, kernels)
        for stack, kernels in stacks.items()
        if stack not in differing and _is_pruned(kernels)
    ]
    everything = [density for kernels in differing.values() for layers in kernels.values() for density in layers]
    pictures = []
    for stack, kernels in differing.items():
        figure = Figure(figsize=(FIGURE[0], 0.8 + 0.22 * len(kernels)))
        axes = figure.subplots()
        # One range for all figures, so that colours can be compared between towers.
        image = axes.imshow(
            np.array(list(kernels.values())), vmin=min(everything), vmax=max(everything), aspect='auto', cmap='viridis'
        )
        axes.set_yticks(range(len(kernels)), list(kernels))
        # Layers are integers, so no tick at 2.5.
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel='layer', title=f'{stack}: share of weights kept')
        figure.colorbar(image)
        pictures.append(_svg(figure))
    return Densities(sentences, pictures)


def _layers_differ(kernels: dict[str, list[float]]) -> bool:
    """Return whether the density of a kernel differs between layers, beyond a few weights that happen to be zero."""
    return any(max(layers) - min(layers) > SAME_DENSITY for layers in kernels.values())


def _is_pruned(kernels: dict[str, list[float]]) -> bool:
    """Return whether a stack has more zeros than a few weights that happen to be zero."""
    return min(density for layers in kernels.values() for density in layers) < 1 - SAME_DENSITY


def _density_sentence(stack: str, kernels: dict[str, list[float]]) -> str:
    """Return the density of the kernels of a stack whose layers are alike."""
    by_density: dict[str, list[str]] = {}
    for name, layers in kernels.items():
        by_density.setdefault(f'{np.mean(layers):.1%}', []).append(name)
    if len(by_density) == 1:
        (density,) = by_density
        return f'{stack}: every kernel of every layer keeps {density} of its weights.'
    parts = [f'{density} of {", ".join(members)}' for density, members in by_density.items()]
    return f'{stack}: every layer keeps {"; ".join(parts)}.'


def _examples(job: Job) -> list[Example]:
    """Return a few questions, spread evenly over all of them, with the answers of all models."""
    results = {name: job.read_result(names.evaluation_stage(name)) for name in names.MODELS}
    metric = recipe.metric(job.config)
    indices = results['dense']['indices']
    examples = []
    # A small test set has fewer questions than the page shows.
    for position in np.unique(np.linspace(0, len(indices) - 1, EXAMPLES).astype(int)):
        record = job.dataset.test.source[indices[position]]
        true = results['dense']['true'][position]
        answers = []
        for name in names.MODELS:
            text = results[name]['predicted'][position]
            # A metric may give partial scores; only the full score is shown as right.
            answers.append(Answer(name, text, is_right=metric(text, true) >= 1))
        examples.append(Example(_png(record['image']), record['question'], true, answers))
    return examples


def _png(pixels: UInt8[np.ndarray, 'height width 3']) -> str:
    """Return a small picture as a data URL."""
    picture = Image.fromarray(pixels)
    # Pictures are embedded in the page, and full-size photos would make it many megabytes large.
    picture.thumbnail(LARGEST_PICTURE)
    file = io.BytesIO()
    picture.save(file, format='png')
    return 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()
