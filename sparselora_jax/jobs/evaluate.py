"""The stages that score the answers of a model, and of a baseline that never sees an image."""

from collections.abc import Callable

import numpy as np

from sparselora_jax import recipe
from sparselora_jax.evaluation import vqa
from sparselora_jax.evaluation.perplexity import held_out_text, window_losses
from sparselora_jax.jobs import evaluate_tasks, names
from sparselora_jax.jobs.job import Job
from sparselora_jax.runtime.progress import Progress


def evaluate(job: Job, name: str, load_weights: Callable[[], dict]) -> dict:
    """Score a model: answers, mean score per kind of answer, and perplexity of a decoder-only language tower.

    Args:
      job: the run.
      name: name of the model, one of `names.ALL_MODELS`.
      load_weights: function that returns its weights; called only if the stage is not done.

    Returns:
      `accuracy` (mean of `evaluate.metric`, overall and by kind), `indices` of the questions, the predicted and true
      answers, `perplexity`, and `window_losses`, the mean loss of each window of the text.
    """
    stage = names.evaluation_stage(name)

    def compute():
        model = job.model
        weights = load_weights()
        # The same seed for every model, because answers are compared question by question.
        indices = vqa.sample(job.config.evaluate.questions, len(job.dataset.test.source), seed=job.config.seed)
        answers = vqa.evaluate(
            model,
            weights,
            job.processor,
            job.text,
            job.dataset.test,
            indices,
            batch=job.config.evaluate.batch,
            # Answers are written at once, so that an interrupted evaluation continues after the last one.
            answers_file=job.stored.writes(f'answers_{name}.jsonl'),
            answers_owner=f'{job.stored.owner} {name}',
            progress=Progress(f'evaluate {name}', len(indices)),
            **job.text.decoding,
        )
        accuracy = answers.accuracy(job.dataset.kind_of, recipe.metric(job.config))
        scores = {}
        windows = {}
        # An encoder-decoder does not assign probabilities to plain text.
        if not model.is_encoder_decoder:
            tokens = np.asarray(job.processor.hf.tokenizer(held_out_text())['input_ids'])
            losses = window_losses(weights['language'], model.cfg.language, tokens)
            scores['perplexity'] = float(np.exp(np.mean(losses)))
            windows['window_losses'] = losses  # the report needs each, for an interval
        job.log.scalars(stage, 0, accuracy | scores)
        return {'accuracy': accuracy, 'indices': indices} | scores | windows | answers._asdict()

    return job.stage(stage, compute)


def score_on_tasks(job: Job, name: str, load_weights: Callable[[], dict]) -> dict:
    """Score a model on the tasks of the recipe; the files of the results are in a folder of the stage's name.

    Args:
      job: the run; nothing happens if its recipe names no task.
      name: name of the model, one of `names.ALL_MODELS`.
      load_weights: function that returns its weights; called only if the stage is not done.

    Returns:
      `tasks`: the `TaskResult` of each task, as a dict; {} if there is none.
    """
    if not job.task_request.tasks:
        return {}
    stage = names.task_stage(name)

    def compute():
        results = evaluate_tasks.evaluate_tasks(
            job.task_request,
            job.tasks,
            job.model,
            load_weights(),
            job.processor,
            output=job.stored.writes(stage),
            name=f'{job.config.model}, {name}',
            # Of which weights and items this run is, `inputs.json` of the workdir says.
            owner=f'{job.stored.owner} {name}',
            label=name,
        )
        headlines = {task: result.values.get(result.headline) for task, result in results.items()}
        job.log.scalars(stage, 0, {task: value for task, value in headlines.items() if value is not None})
        return {'tasks': {task: result._asdict() for task, result in results.items()}}

    return job.stage(stage, compute)


def floor(job: Job) -> dict:
    """Score the same questions for a model that never sees an image.

    Args:
      job: the run.
    """

    def compute():
        # Only texts are read: no image is needed, and reading images takes minutes.
        train = job.dataset.train.read_texts()
        test = job.dataset.test.read_texts()
        indices = vqa.sample(job.config.evaluate.questions, len(test), seed=job.config.seed)
        answers = vqa.blind_floor(train, [test[index] for index in indices])
        return {'accuracy': answers.accuracy(job.dataset.kind_of, recipe.metric(job.config))}

    return job.stage(names.FLOOR, compute)
