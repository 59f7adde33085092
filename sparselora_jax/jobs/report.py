"""What a run showed: `report.json` for machines, `report.html` (one self-contained file) for people."""

import importlib.metadata
import json
from typing import Any

from sparselora_jax.evaluation import bootstrap, metric, vqa
from sparselora_jax.jobs.page import MODELS, render
from sparselora_jax.runtime.files import write_text

PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def build(job: Any) -> dict:
    """The report of a finished job, from what its stages left in the workdir."""
    results = {path.stem: json.loads(path.read_text()) for path in job.workdir.glob('*.json')}
    evaluations = {name: results[f'evaluate_{name}'] for name in MODELS}
    correct = {
        name: vqa.Answers(e['predicted'], e['true']).scores(metric.EXACT_MATCH) for name, e in evaluations.items()
    }
    export, restore = results['export'], results['restore']
    baselines = {'image_blind': results['floor']['accuracy']}
    if 'lora_merged_density' in export:  # LoRA was trained
        baselines['lora_merged_density'] = export['lora_merged_density']
    if 'evaluate_control' in results:
        control = results['evaluate_control']
        kept = {'perplexity': control['perplexity']} if 'perplexity' in control else {}
        baselines['dense_control'] = control['accuracy'] | kept
    lost = evaluations['dense']['accuracy']['overall'] - evaluations['pruned']['accuracy']['overall']
    won = evaluations['restored']['accuracy']['overall'] - evaluations['pruned']['accuracy']['overall']
    times = {
        name: results[name]['seconds'] for name in ('zeros', 'prune', 'round', 'teacher', 'export') if name in results
    }
    times['evaluate'] = sum(e['seconds'] for e in evaluations.values())
    times['restore'] = restore['steps_s']  # all sessions of an interrupted run
    return {
        'scores': {name: e['accuracy']['overall'] for name, e in evaluations.items()},
        'scores_by_kind': {name: e['accuracy'] for name, e in evaluations.items()},
        'questions': len(evaluations['dense']['true']),
        'won_back': won / lost if lost > 0 else None,
        'intervals': {
            f'{name} - dense': bootstrap.paired_interval(correct[name], correct['dense']) for name in MODELS[1:]
        },
        'perplexity': {name: e['perplexity'] for name, e in evaluations.items() if 'perplexity' in e},
        'baselines': baselines,
        'sparsity': export['sparsity'],
        'time_s': times,
        'step_s': restore['step_s'],
        'peak_memory_bytes': max(result.get('peak_memory_bytes', 0) for result in results.values()),
        'bytes': export['bytes'],
        'config': results['config'],
        'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def summary(report: dict) -> str:
    """The report's scores in a few lines, for a terminal."""
    lines = [f'{name:9} accuracy {report["scores"][name]:7.1%}' for name in MODELS]
    if report['perplexity']:  # of a decoder-only language tower
        lines = [
            f'{line}   perplexity {report["perplexity"][name]:8.1f}' for line, name in zip(lines, MODELS, strict=True)
        ]
    for tower, found in report['sparsity'].items():
        density = f'density {found["density"]:.4f}   {found["violations"]} violations'
        lines.append(f'{tower:9} pattern {found["pattern"]:>6}   {density}')
    if report['won_back'] is not None:
        lines.append(f'{report["won_back"]:.1%} of the accuracy that pruning lost is won back')
    return '\n'.join(lines)


def write(job: Any) -> dict:
    """Builds the report and writes both files into the workdir."""
    report = build(job)
    write_text(job.workdir / 'report.html', render(job, report))
    write_text(job.workdir / 'report.json', json.dumps(report, indent=1))
    return report
