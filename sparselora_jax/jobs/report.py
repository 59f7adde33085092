"""Write the report of a run: `report.json` for machines, `report.html` (one self-contained file) for people."""

import importlib.metadata
import json
from pathlib import Path

from sparselora_jax import recipe
from sparselora_jax.evaluation import bootstrap, vqa
from sparselora_jax.jobs import names
from sparselora_jax.jobs.job import Job
from sparselora_jax.jobs.page import render
from sparselora_jax.runtime.files import read_json, write_text
from sparselora_jax.sparse.patterns import PatternError

PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')  # packages whose versions are reported


def build(job: Job) -> dict:
    """Return the report of a finished run, from the files that its stages left in the workdir.

    Args:
      job: the run.
    """
    # Results come from the files, so that a report can be written again without loading a model.
    remedy = 'delete it, and run the job again'
    files = [path for path in job.workdir.glob('*.json') if path.stem != 'report']
    results = {path.stem: read_json(path, remedy) for path in files}
    evaluations = {name: results[names.evaluation_stage(name)] for name in names.MODELS}
    scores = {name: evaluation['accuracy']['overall'] for name, evaluation in evaluations.items()}
    restored = results[names.TRAINING['restored']]
    exported = results[names.EXPORT]
    return {
        'metric': recipe.metric(job.config).title,
        'scores': scores,
        'scores_by_kind': {name: evaluation['accuracy'] for name, evaluation in evaluations.items()},
        'questions': len(evaluations['dense']['true']),
        'won_back': _won_back(scores),
        'intervals': _intervals(job, evaluations),
        'perplexity': {
            name: evaluation['perplexity'] for name, evaluation in evaluations.items() if 'perplexity' in evaluation
        },
        'baselines': _baselines(results),
        'sparsity': exported['sparsity'],
        'time_s': _times(results),
        'step_s': restored['step_s'],
        'peak_memory_bytes': max(result.get('peak_memory_bytes', 0) for result in results.values()),
        'bytes': exported['bytes'],
        'config': results['config'],
        'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _won_back(scores: dict[str, float]) -> float | None:
    """Return the share of pruning's loss of score that restoration won back, or None if pruning lost nothing."""
    # Only of the score over all questions, since some kinds of questions lose nothing.
    lost = scores['dense'] - scores['pruned']
    won = scores['restored'] - scores['pruned']
    return won / lost if lost > 0 else None


def _intervals(job: Job, evaluations: dict[str, dict]) -> dict[str, tuple[float, float]]:
    """Return the confidence interval of each model's score minus the dense model's."""
    metric = recipe.metric(job.config)
    scores = {
        name: vqa.Answers(evaluation['predicted'], evaluation['true']).scores(metric)
        for name, evaluation in evaluations.items()
    }
    others = (name for name in names.MODELS if name != 'dense')
    return {f'{name} - dense': bootstrap.paired_interval(scores[name], scores['dense']) for name in others}


def _baselines(results: dict[str, dict]) -> dict:
    """Return the baselines that the models are compared with."""
    baselines = {'image_blind': results[names.FLOOR]['accuracy']}
    exported = results[names.EXPORT]
    if 'lora_merged_density' in exported:  # only if LoRA was trained
        baselines['lora_merged_density'] = exported['lora_merged_density']
    control = results.get(names.evaluation_stage(names.CONTROL))
    if control is not None:
        baselines['dense_control'] = dict(control['accuracy'])
        if 'perplexity' in control:
            baselines['dense_control']['perplexity'] = control['perplexity']
    return baselines


def _times(results: dict[str, dict]) -> dict[str, float]:
    """Return the seconds of each stage."""
    stages = (names.ZEROS, names.PRUNE, names.ROUND, names.TEACHER, names.EXPORT)  # some recipes have fewer
    times = {stage: results[stage]['seconds'] for stage in stages if stage in results}
    times['evaluate'] = sum(results[names.evaluation_stage(name)]['seconds'] for name in names.MODELS)
    # `steps_s` covers all processes of an interrupted run; `seconds` covers only the last process.
    times['restore'] = results[names.TRAINING['restored']]['steps_s']
    return times


def summary(report: dict) -> str:
    """Return the report's scores in a few lines, for a terminal.

    Args:
      report: see `build`.
    """
    title = report['metric']
    lines = []
    for name in names.MODELS:
        line = f'{name:9} {title} {report["scores"][name]:7.1%}'
        if name in report['perplexity']:  # only a decoder-only language tower has one
            line += f'   perplexity {report["perplexity"][name]:8.1f}'
        lines.append(line)
    for tower, counts in report['sparsity'].items():
        density = f'density {counts["density"]:.4f}   {counts["violations"]} violations'
        lines.append(f'{tower:9} pattern {counts["pattern"]:>6}   {density}')
    if report['won_back'] is not None:
        lines.append(f'{report["won_back"]:.1%} of the {title} that pruning lost is won back')
    return '\n'.join(lines)


def check_zeros(report: dict, workdir: str | Path) -> None:
    """Check that the exported model has all zeros that its patterns promise.

    Args:
      report: see `build`.
      workdir: the folder of the run.

    Raises:
      PatternError: comparison groups of a tower have fewer zeros than promised; names the towers.
    """
    wrong = {tower: counts['violations'] for tower, counts in report['sparsity'].items() if counts['violations']}
    if wrong:
        towers = ', '.join(f'{count:,} groups of the tower {tower}' for tower, count in wrong.items())
        raise PatternError(f'{workdir}: {towers} do not have the zeros of their pattern; use another workdir')


def write(job: Job) -> dict:
    """Write `report.json` and `report.html` into the workdir, and return the report.

    Args:
      job: a finished run.
    """
    report = build(job)
    # The page is written first, so if `report.json` exists, the report is complete.
    write_text(job.workdir / 'report.html', render(job, report))
    write_text(job.workdir / 'report.json', json.dumps(report, indent=1))
    return report
