"""Write the report of a run: `report.json` for machines, `report.html` (one self-contained file) for people."""

import json

import numpy as np
from jaxtyping import Float

from sparselora_jax import recipe
from sparselora_jax.evaluation import intervals, task_runs, vqa
from sparselora_jax.evaluation.task_runs import TaskResult
from sparselora_jax.jobs import environment, names
from sparselora_jax.jobs.job import Job
from sparselora_jax.jobs.names import PACKED
from sparselora_jax.jobs.page import render
from sparselora_jax.runtime.files import write_text

# Pairs of models whose difference is reported: (model, the one that it is compared with).
PAIRS = (('pruned', 'dense'), ('restored', 'dense'), ('restored', 'pruned'))


def build(job: Job) -> dict:
    """Return the report of a finished run, from the files that its stages left in the workdir.

    Args:
      job: the run.
    """
    # Results come from the files, so that a report can be written again without loading a model.
    results = job.stored.results()
    evaluations = {name: results[names.evaluation_stage(name)] for name in names.MODELS}
    scores = {name: evaluation['accuracy']['overall'] for name, evaluation in evaluations.items()}
    restored = results[names.TRAINING['restored']]
    exported = results[names.EXPORT]
    # A workdir of an older version has no record; then the versions are those that write this report.
    environments = environment.recorded(job.stored) or [environment.describe(job.config)]
    answers = _scores_of_answers(job, evaluations)
    return {
        'metric': recipe.metric(job.config).title,
        'scores': scores,
        'scores_by_kind': {name: evaluation['accuracy'] for name, evaluation in evaluations.items()},
        'questions': len(evaluations['dense']['true']),
        'won_back': _won_back(scores),
        'score_intervals': {name: intervals.score_interval(values) for name, values in answers.items()},
        'intervals': {
            pair_name(first, second): intervals.paired_interval(answers[first], answers[second])
            for first, second in PAIRS
        },
        'perplexity': {
            name: evaluation['perplexity'] for name, evaluation in evaluations.items() if 'perplexity' in evaluation
        },
        'perplexity_intervals': _perplexity_intervals(evaluations),
        'perplexity_ratios': _perplexity_ratios(evaluations),
        'tasks': compare_tasks(results),
        'baselines': _baselines(results),
        'sparsity': exported['sparsity'],
        'time_s': _times(results),
        'step_s': restored['step_s'],
        'peak_memory_bytes': max(result.get('peak_memory_bytes', 0) for result in results.values()),
        # A packed format is there only if it was exported before this report was written.
        'bytes': exported['bytes'] | {stage: results[stage]['bytes'] for stage in PACKED if stage in results},
        'config': json.loads(job.config.to_json()),
        'versions': environments[-1]['versions'],
        'environments': environments,
    }


def compare_tasks(results: dict[str, dict]) -> dict[str, dict]:
    """Return what each model reached in each task of a run, and how far the models differ.

    Args:
      results: result of each stage that is done.

    Returns:
      Of each task: `headline` (the value that is compared), `items`, `expected` (items of the whole benchmark),
      `notes`, and by model `scores` (the headline; None: not scored), `stderr` and `values`; `intervals`, the 95 %
      interval of the difference of each pair of models, in the unit of the headline; and `won_back`.
    """
    by_model = {
        model: results[names.task_stage(model)]['tasks']
        for model in names.ALL_MODELS
        if names.task_stage(model) in results
    }
    # All models of a run answer the same tasks, so any of them knows their names.
    tasks = next(iter(by_model.values()), {})
    return {
        task: _compare_models({model: TaskResult(**done[task]) for model, done in by_model.items()}) for task in tasks
    }


def _compare_models(results: dict[str, TaskResult]) -> dict:
    """Return what each model reached in one task; see `compare_tasks`."""
    any_result = next(iter(results.values()))
    headline = any_result.headline
    scores = {model: result.values.get(headline) for model, result in results.items()}
    pairs = [pair for pair in PAIRS if results.keys() >= set(pair)]
    differences = {
        pair_name(first, second): task_runs.paired_interval(results[first], results[second]) for first, second in pairs
    }
    has_all = all(scores.get(model) is not None for model in names.MODELS)
    return {
        'headline': headline,
        'items': any_result.scored,
        'expected': any_result.expected,
        'notes': list(dict.fromkeys(note for result in results.values() for note in result.notes)),
        'scores': scores,
        'stderr': {model: result.stderr.get(headline) for model, result in results.items()},
        'values': {model: result.values for model, result in results.items()},
        'intervals': {name: interval for name, interval in differences.items() if interval is not None},
        'won_back': _won_back(scores) if has_all else None,
    }


def task_lines(tasks: dict[str, dict]) -> list[str]:
    """Return a line for each task: its headline for each model, for a terminal.

    Args:
      tasks: see `compare_tasks`.
    """
    lines = []
    for name, task in tasks.items():
        scores = [f'{model} {task_runs.score_text(score)}' for model, score in task['scores'].items()]
        lines.append(
            f'{names.task_title(name):20} {task["headline"]:10} {"   ".join(scores)}   {task["items"]:,} items'
        )
    return lines


def _won_back(scores: dict[str, float]) -> float | None:
    """Return the share of pruning's loss of score that restoration won back, or None if pruning lost nothing."""
    # Only of the score over all questions, since some kinds of questions lose nothing.
    lost = scores['dense'] - scores['pruned']
    won = scores['restored'] - scores['pruned']
    return won / lost if lost > 0 else None


def pair_name(first: str, second: str) -> str:
    """Return the key of the difference between two models in the report."""
    return f'{first} - {second}'


def _scores_of_answers(job: Job, evaluations: dict[str, dict]) -> dict[str, np.ndarray]:
    """Return the score of every answer of each model."""
    metric = recipe.metric(job.config)
    return {
        name: vqa.Answers(evaluation['predicted'], evaluation['true']).scores(metric)
        for name, evaluation in evaluations.items()
    }


def _window_losses(evaluation: dict) -> Float[np.ndarray, ' windows']:
    """Return the mean loss of each window of text; empty for an encoder-decoder, which reads no plain text."""
    return np.asarray(evaluation.get('window_losses', ()), np.float64)


def _perplexity_intervals(evaluations: dict[str, dict]) -> dict[str, tuple[float, float]]:
    """Return the interval of each model's perplexity, which has none without several windows of text."""
    every = {name: _exp_interval(_window_losses(evaluation)) for name, evaluation in evaluations.items()}
    return {name: interval for name, interval in every.items() if interval is not None}


def _perplexity_ratios(evaluations: dict[str, dict]) -> dict[str, dict]:
    """Return how many times as large a model's perplexity is, with an interval, for each of `PAIRS`.

    Both models read the same windows, so the difference of their losses varies less than either.
    """
    ratios = {}
    for first, second in PAIRS:
        differences = _window_losses(evaluations[first]) - _window_losses(evaluations[second])
        interval = _exp_interval(differences)
        if interval is not None:
            ratio = float(np.exp(np.mean(differences)))
            ratios[pair_name(first, second)] = {'ratio': ratio, 'interval': interval}
    return ratios


def _exp_interval(losses: Float[np.ndarray, ' windows']) -> tuple[float, float] | None:
    """Return the interval of exp(mean loss), or None if there are too few losses for one."""
    if len(losses) < 2:
        return None
    # Student's t on the losses: a bootstrap of the few windows of a page would be far too narrow.
    mean, half = intervals.mean_interval(losses.tolist())
    return float(np.exp(mean - half)), float(np.exp(mean + half))


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
    scored = [results[names.task_stage(name)]['seconds'] for name in names.MODELS if names.task_stage(name) in results]
    if scored:
        times['tasks'] = sum(scored)
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
    lines += task_lines(report['tasks'])
    lines.append(tower_lines(report['sparsity']))
    if report['won_back'] is not None:
        lines.append(f'{report["won_back"]:.1%} of the {title} that pruning lost is won back')
    return '\n'.join(lines)


def tower_lines(sparsity: dict[str, dict]) -> str:
    """Return a line for each tower, with its pattern, its density and its violations.

    Args:
      sparsity: counts of each tower, see `export.count_zeros`.
    """
    lines = []
    for tower, counts in sparsity.items():
        density = f'density {counts["density"]:.4f}   {counts["violations"]} violations'
        lines.append(f'{tower:9} pattern {counts["pattern"]:>6}   {density}')
    return '\n'.join(lines)


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
