"""What a run showed: `report.json` for machines, `report.html` (one self-contained file) for people."""

import base64
import html
import importlib.metadata
import io
import json
from typing import Any

import numpy as np

from sparselora_jax.evaluation import bootstrap, vqa
from sparselora_jax.recipe import TOWERS
from sparselora_jax.storage import write_text

MODELS = ('dense', 'pruned', 'restored')
PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def build(job: Any) -> dict:
    """The report of a finished job, from what its stages left in the workdir."""
    results = {path.stem: json.loads(path.read_text()) for path in job.workdir.glob('*.json')}
    evaluations = {name: results[f'evaluate_{name}'] for name in MODELS}
    correct = {name: vqa.Answers(e['predicted'], e['true']).correct for name, e in evaluations.items()}
    export, restore = results['export'], results['restore']
    baselines = {'lora_merged_density': export['lora_merged_density'], 'image_blind': results['floor']['accuracy']}
    if 'evaluate_control' in results:
        control = results['evaluate_control']
        baselines['dense_control'] = control['accuracy'] | {'perplexity': control['perplexity']}
    lost = evaluations['dense']['accuracy']['overall'] - evaluations['pruned']['accuracy']['overall']
    won = evaluations['restored']['accuracy']['overall'] - evaluations['pruned']['accuracy']['overall']
    times = {name: result['seconds'] for name, result in results.items() if 'seconds' in result}
    times['restore'] = restore['steps_s']  # all sessions of an interrupted run
    return {
        'scores': {name: e['accuracy']['overall'] for name, e in evaluations.items()},
        'scores_by_kind': {name: e['accuracy'] for name, e in evaluations.items()},
        'questions': len(evaluations['dense']['true']),
        'won_back': won / lost if lost else None,
        'intervals': {
            f'{name} - dense': bootstrap.paired_interval(correct[name], correct['dense']) for name in MODELS[1:]
        },
        'perplexity': {name: e['perplexity'] for name, e in evaluations.items()},
        'baselines': baselines,
        'sparsity': export['sparsity'],
        'time_s': times,
        'step_s': restore['step_s'],
        'peak_memory_bytes': max(result.get('peak_memory_bytes', 0) for result in results.values()),
        'bytes': export['bytes'],
        'config': results['config'],
        'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def write(job: Any) -> dict:
    """Builds the report and writes both files into the workdir."""
    report = build(job)
    write_text(job.workdir / 'report.html', _page(job, report))
    write_text(job.workdir / 'report.json', json.dumps(report, indent=1))
    return report


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; text-align: left }
tr { border-bottom: 1px solid #ddd } .scores { display: flex; flex-wrap: wrap; gap: 1rem }
.score { flex: 1 1 8rem; background: #f3f5f9; border-radius: .5rem; padding: .8rem; text-align: center }
.score b { display: block; font-size: 2rem } svg, img { max-width: 100%; height: auto }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem }
.example { border: 1px solid #ddd; border-radius: .5rem; padding: .6rem; font-size: .9rem }
.example img { width: 96px; image-rendering: pixelated } .right { color: #16733a } .wrong { color: #b3261e }
.wide { overflow-x: auto }
"""


def _page(job: Any, report: dict) -> str:
    scores = ''.join(
        f'<div class="score">{name}<b>{report["scores"][name]:.1%}</b>perplexity {report["perplexity"][name]:.1f}</div>'
        for name in MODELS
    )
    kinds = list(report['scores_by_kind']['dense'])
    by_kind = _table(
        ['model', *kinds],
        [[name, *(f'{report["scores_by_kind"][name][kind]:.1%}' for kind in kinds)] for name in MODELS]
        + [['image-blind floor', *(f'{report["baselines"]["image_blind"][kind]:.1%}' for kind in kinds)]],
    )
    intervals = _table(
        ['difference', '95 % interval (paired bootstrap)'],
        [[name, f'{low:+.1%} to {high:+.1%}'] for name, (low, high) in report['intervals'].items()],
    )
    sparsity = _table(
        ['tower', 'pattern', 'density', 'violations'],
        [[t, s['pattern'], f'{s["density"]:.4f}', s['violations']] for t, s in report['sparsity'].items()],
    )
    costs = _table(
        ['what', 'cost'],
        [[name, f'{seconds:.0f} s'] for name, seconds in report['time_s'].items()]
        + [['one restoration step', f'{report["step_s"]:.2f} s']]
        + [['peak memory', f'{report["peak_memory_bytes"] / 2**30:.2f} GiB']]
        + [[f'size, {name}', f'{size / 1e6:.0f} MB'] for name, size in report['bytes'].items()],
    )
    merged = report['baselines']['lora_merged_density']
    won = 'nothing was lost' if report['won_back'] is None else f'{report["won_back"]:.0%} of what pruning lost'
    config = html.escape(json.dumps(report['config'], indent=1))
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>sparselora-jax: {job.workdir.name}</title>
<style>{_STYLE}</style></head><body>
<h1>Prune, restore, export</h1>
<p>{report['questions']} test questions, answers generated greedily. Won back: {won}.</p>
<div class="scores">{scores}</div>
<h2>Accuracy by kind of answer</h2><div class="wide">{by_kind}</div>{intervals}
<h2>Sparsity of the exported model</h2><div class="wide">{sparsity}</div>
<p>Merged the plain LoRA way, outside the mask, the pruned kernels would have density {merged:.3f}.</p>
<h2>Restoration</h2>{_curves(job)}
<h2>Density per layer</h2>{_densities(job)}
<h2>What they answer</h2><div class="examples">{_examples(job)}</div>
<h2>Time and memory</h2>{costs}
<h2>Config</h2><details><summary>all fields</summary><pre>{config}</pre></details>
</body></html>
"""


def _table(head: list[str], rows: list[list[Any]]) -> str:
    def row(cells, tag):
        return '<tr>' + ''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells) + '</tr>'

    return '<table>' + row(head, 'th') + ''.join(row(cells, 'td') for cells in rows) + '</table>'


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format='svg', bbox_inches='tight')
    text = file.getvalue()
    return text[text.index('<svg') :]


def _figure(width: float = 8, height: float = 3) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _curves(job: Any) -> str:
    figure, axes = _figure()
    for name in ('loss', 'ce', 'kl'):
        if points := job.log.curve('restore', name):
            axes.plot(*zip(*points, strict=True), label=name)
    axes.set(xlabel='step', yscale='log', title='losses while restoring')
    axes.legend()
    return _svg(figure)


def _densities(job: Any) -> str:
    layers = json.loads((job.workdir / 'export.json').read_text())['layer_density']
    parts = []
    for tower in TOWERS:
        kernels = layers[tower]
        figure, axes = _figure(8, 0.6 + 0.22 * len(kernels))
        picture = axes.imshow(np.array(list(kernels.values())), vmin=0, vmax=1, aspect='auto', cmap='viridis')
        axes.set_yticks(range(len(kernels)), [path.removeprefix(f'{tower}/blocks/') for path in kernels])
        axes.set(xlabel='layer', title=tower)
        figure.colorbar(picture)
        parts.append(_svg(figure))
    return ''.join(parts)


def _examples(job: Any, count: int = 12) -> str:
    results = {name: json.loads((job.workdir / f'evaluate_{name}.json').read_text()) for name in MODELS}
    source, indices = job.builder.as_data_source('test'), results['dense']['indices']
    cards = []
    for position in np.linspace(0, len(indices) - 1, count).astype(int):
        record, true = source[indices[position]], results['dense']['true'][position]
        answers = ''
        for name in MODELS:
            said = results[name]['predicted'][position]
            kind = 'right' if said == true else 'wrong'
            answers += f'<div>{name}: <span class="{kind}">{html.escape(said) or "(nothing)"}</span></div>'
        question = html.escape(record['question'].decode())
        picture = _png(record['image'])
        cards.append(
            f'<div class="example"><img alt="" src="{picture}"><p>{question}<br>true: {true}</p>{answers}</div>'
        )
    return ''.join(cards)


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format='png')
    return 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()
