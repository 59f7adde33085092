"""A run's report as one self-contained HTML page."""

import base64
import html
import io
import json
from typing import Any

import numpy as np

MODELS = ('dense', 'pruned', 'restored')

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; text-align: left }
tr { border-bottom: 1px solid #ddd } .scores { display: flex; flex-wrap: wrap; gap: 1rem }
.score { flex: 1 1 8rem; background: #f3f5f9; border-radius: .5rem; padding: .8rem; text-align: center }
.score b { display: block; font-size: 2rem } svg, img { max-width: 100%; height: auto }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem }
.example { border: 1px solid #ddd; border-radius: .5rem; padding: .6rem; font-size: .9rem }
.example img { width: 96px; image-rendering: pixelated } .right { color: #16733a } .wrong { color: #b3261e }
.wide { overflow-x: auto } table + table, .wide + table { margin-top: 1.2rem }
@media (max-width: 32rem) {
  td, th { padding: .2rem .25rem; font-size: .85rem } .score b { font-size: 1.4rem }
  .score { flex-basis: 5rem; padding: .5rem .2rem; font-size: .8rem }
  .examples { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .5rem }
}
"""


def render(job: Any, report: dict) -> str:
    """The page: scores, sparsity, losses, densities, a dozen answers, costs, config."""
    perplexity = {name: f'perplexity {value:.1f}' for name, value in report['perplexity'].items()}
    scores = ''.join(
        f'<div class="score">{name}<b>{report["scores"][name]:.1%}</b>{perplexity.get(name, "")}</div>'
        for name in MODELS
    )
    kinds = list(report['scores_by_kind']['dense'])
    baselines = {'image_blind': 'image-blind floor', 'dense_control': 'dense, same LoRA budget'}
    baselines = {key: name for key, name in baselines.items() if key in report['baselines']}
    by_kind = _table(
        ['model', *kinds],
        [[name, *(f'{report["scores_by_kind"][name][kind]:.1%}' for kind in kinds)] for name in MODELS]
        + [[name, *(f'{report["baselines"][key][kind]:.1%}' for kind in kinds)] for key, name in baselines.items()],
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
    merged = report['baselines'].get('lora_merged_density')
    if merged is None:
        merged = 'The pruned kernels themselves were trained, under their masks.'
    else:
        merged = (
            'Merged as plain LoRA is, outside the mask, these factors would leave the pruned kernels at density '
            f'{merged:.3f}.'
        )
    won = 'nothing was lost' if report['won_back'] is None else f'{report["won_back"]:.0%} of what pruning lost'
    beams = report['config']['evaluate']['num_beams']
    how = 'greedily' if beams == 1 else f'with {beams} beams'
    config = html.escape(json.dumps(report['config'], indent=1))
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>sparselora-jax: {job.workdir.name}</title>
<style>{_STYLE}</style></head><body>
<h1>Prune, restore, export</h1>
<p>{report['questions']} test questions, answers generated {how}. Won back: {won}.</p>
<div class="scores">{scores}</div>
<h2>Accuracy by kind of answer</h2><div class="wide">{by_kind}</div>{intervals}
<h2>Sparsity of the exported model</h2><div class="wide">{sparsity}</div>
<p>{merged}</p>
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
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({'svg.hashsalt': 'sparselora'}):  # the same run writes the same page
        figure.savefig(file, format='svg', bbox_inches='tight', metadata={'Date': None})
    text = file.getvalue()
    return text[text.index('<svg') :]


def _figure(width: float = 6, height: float = 2.6) -> tuple[Any, Any]:
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
    towers = json.loads((job.workdir / 'export.json').read_text())['layer_density']
    stacks: dict[str, dict[str, list[float]]] = {}  # a tower may hold two, an encoder and a decoder
    for path, layers in (item for kernels in towers.values() for item in kernels.items()):
        stack, name = path.removesuffix('/kernel').split('/blocks/')
        stacks.setdefault(stack, {})[name] = layers
    parts = []
    for stack, kernels in stacks.items():
        figure, axes = _figure(height=0.6 + 0.2 * len(kernels))
        picture = axes.imshow(np.array(list(kernels.values())), vmin=0, vmax=1, aspect='auto', cmap='viridis')
        axes.set_yticks(range(len(kernels)), list(kernels))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel='layer', title=f'{stack}: share of weights kept')
        figure.colorbar(picture)
        parts.append(_svg(figure))
    return ''.join(parts)


def _examples(job: Any, count: int = 12) -> str:
    results = {name: json.loads((job.workdir / f'evaluate_{name}.json').read_text()) for name in MODELS}
    source, indices = job.dataset.test.source, results['dense']['indices']
    cards = []
    for position in np.linspace(0, len(indices) - 1, count).astype(int):
        record, true = source[indices[position]], results['dense']['true'][position]
        answers = ''
        for name in MODELS:
            said = results[name]['predicted'][position]
            kind = 'right' if said.lower() == true.lower() else 'wrong'
            answers += f'<div>{name}: <span class="{kind}">{html.escape(said) or "(nothing)"}</span></div>'
        question = html.escape(record['question'])
        picture = _png(record['image'])
        said = f'<p>{question}<br>true: {html.escape(true)}</p>{answers}'
        cards.append(f'<div class="example"><img alt="" src="{picture}">{said}</div>')
    return ''.join(cards)


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    file, picture = io.BytesIO(), Image.fromarray(pixels)
    picture.thumbnail((160, 160))
    picture.save(file, format='png')
    return 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()
