"""Render a run's report as one self-contained HTML page, from the template `templates/report.html.jinja`."""

import base64
import io
import json
from dataclasses import dataclass

import jinja2
import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image

from sparselora_jax import recipe
from sparselora_jax.jobs import names
from sparselora_jax.jobs.job import Job
from sparselora_jax.sparse.rules import name_in_block, stack_of

EXAMPLES = 12  # questions that the page shows
LARGEST_PICTURE = (160, 160)  # pixels
BASELINES = {'image_blind': names.FLOOR_TITLE, 'dense_control': names.CONTROL_TITLE}  # key in the report -> title
LOSSES = ('loss', 'ce', 'kl')

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


def render(job: Job, report: dict) -> str:
    """Return the page: scores, sparsity, losses, densities, a dozen answers, costs, config.

    Args:
      job: a finished run.
      report: see `report.build`.
    """
    perplexity = {name: f'perplexity {value:.1f}' for name, value in report['perplexity'].items()}
    scores = [
        {'model': name, 'value': f'{report["scores"][name]:.1%}', 'perplexity': perplexity.get(name, '')}
        for name in names.MODELS
    ]
    won_back = report['won_back']
    # From the report, which stores the config of the run as JSON.
    beams = report['config']['evaluate']['num_beams']
    metric = report['metric']
    return _TEMPLATES.get_template('report.html.jinja').render(
        title=job.workdir.name,
        report=report,
        metric=metric[:1].upper() + metric[1:],
        decoding='greedily' if beams == 1 else f'with {beams} beams',
        won_back='nothing was lost' if won_back is None else f'{won_back:.0%} of what pruning lost',
        scores=scores,
        by_kind=_scores_by_kind(report),
        intervals=_intervals(report),
        sparsity=_sparsity(report),
        merged_density=_merged_density(report),
        curves=_curves(job),
        densities=_densities(job),
        examples=_examples(job),
        costs=_costs(report),
        config=json.dumps(report['config'], indent=1),
    )


def _scores_by_kind(report: dict) -> Table:
    # Baselines are rows like models, but the recipe decides which of them exist.
    by_model = {name: report['scores_by_kind'][name] for name in names.MODELS}
    by_baseline = {name: report['baselines'][key] for key, name in BASELINES.items() if key in report['baselines']}
    kinds = list(by_model['dense'])
    rows = [[name, *(f'{scores[kind]:.1%}' for kind in kinds)] for name, scores in (by_model | by_baseline).items()]
    return Table(['model', *kinds], rows)


def _intervals(report: dict) -> Table:
    rows = [[name, f'{low:+.1%} to {high:+.1%}'] for name, (low, high) in report['intervals'].items()]
    return Table(['difference', '95 % interval (paired bootstrap)'], rows)


def _sparsity(report: dict) -> Table:
    rows = [
        [tower, counts['pattern'], f'{counts["density"]:.4f}', counts['violations']]
        for tower, counts in report['sparsity'].items()
    ]
    return Table(['tower', 'pattern', 'density', 'violations'], rows)


def _merged_density(report: dict) -> str:
    density = report['baselines'].get('lora_merged_density')
    if density is None:
        return 'The pruned kernels themselves were trained, under their masks.'
    return (
        'Merged as plain LoRA is, outside the mask, these factors would leave the pruned kernels at density '
        f'{density:.3f}.'
    )


def _costs(report: dict) -> Table:
    rows = [[stage, f'{seconds:.0f} s'] for stage, seconds in report['time_s'].items()]
    rows.append(['one restoration step', f'{report["step_s"]:.2f} s'])
    rows.append(['peak memory', f'{report["peak_memory_bytes"] / 2**30:.2f} GiB'])
    rows += [[f'size, {name}', f'{size / 1e6:.0f} MB'] for name, size in report['bytes'].items()]
    return Table(['what', 'cost'], rows)


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
    figure = Figure(figsize=(6, 2.6))
    axes = figure.subplots()
    for name in LOSSES:
        points = job.log.curve(names.TRAINING['restored'], name)
        if points:  # there is no 'kl' without a teacher
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=name)
    axes.set(xlabel='step', yscale='log', title='losses while restoring')
    axes.legend()
    return _svg(figure)


def _densities(job: Job) -> list[str]:
    """Plot the density of each kernel and layer, with one figure for each stack of blocks."""
    layer_density = job.read_result(names.EXPORT)['layer_density']
    stacks: dict[str, dict[str, list[float]]] = {}  # a tower may hold two, an encoder and a decoder
    for kernels in layer_density.values():
        for path, layers in kernels.items():
            name = name_in_block(path).removesuffix('/kernel')
            stacks.setdefault(stack_of(path), {})[name] = layers
    pictures = []
    for stack, kernels in stacks.items():
        figure = Figure(figsize=(6, 0.6 + 0.2 * len(kernels)))
        axes = figure.subplots()
        # The range is 0 to 1 in every figure, so that colours can be compared between towers.
        image = axes.imshow(np.array(list(kernels.values())), vmin=0, vmax=1, aspect='auto', cmap='viridis')
        axes.set_yticks(range(len(kernels)), list(kernels))
        # Layers are integers, so no tick at 2.5.
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel='layer', title=f'{stack}: share of weights kept')
        figure.colorbar(image)
        pictures.append(_svg(figure))
    return pictures


def _examples(job: Job) -> list[Example]:
    """Return a few questions, spread evenly over all of them, with the answers of all models."""
    results = {name: job.read_result(names.evaluation_stage(name)) for name in names.MODELS}
    metric = recipe.metric(job.config)
    indices = results['dense']['indices']
    examples = []
    for position in np.linspace(0, len(indices) - 1, EXAMPLES).astype(int):
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
