"""Turn the fields about data and answers into a loader, a text format, decoding arguments and a metric."""

from dataclasses import replace
from typing import Any

from ml_collections import ConfigDict

from sparselora_jax.data.dataset import Loader, Mixture
from sparselora_jax.data.loaders import find_loader
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation.metric import METRICS, Metric
from sparselora_jax.evaluation.tasks import check_name, is_own_data
from sparselora_jax.recipe.config import ConfigError, value_of
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.registry import UnknownNameError

# Fields of `config.evaluate` that are not arguments of `generate`.
NO_DECODING = ('questions', 'batch', 'metric', 'tasks', 'data_root', 'limit')


def data_loader(config: ConfigDict, field: str = 'data') -> Loader:
    """Return the loader of the data set that a recipe names.

    Args:
      config: a recipe.
      field: the field with the name: `data`, or `prune.data`.

    Raises:
      ConfigError: the field is `package.module:Name`, and that loader does not exist.
    """
    try:
        return find_loader(value_of(config, field))
    except UnknownNameError as error:
        raise ConfigError(f'{field}: {error}') from None


def mixture(config: ConfigDict) -> Mixture:
    """Return how training records are drawn from the sources of the data.

    Args:
      config: a recipe.
    """
    fields = config.mixture
    return Mixture(
        samples=fields.samples,
        weights=tuple(fields.weights),
        captions=fields.captions,
        is_clean=fields.clean,
        tolerance=fields.tolerance,
    )


def calibration_mixture(config: ConfigDict) -> Mixture:
    """Return how calibration samples are drawn, where they are not drawn from the training records.

    Args:
      config: a recipe.
    """
    # Weights are those of the sources of `data`, and calibration may have other sources.
    weights = () if config.prune.data else tuple(config.mixture.weights)
    return replace(
        mixture(config),
        samples=calibration_samples(config),
        weights=weights,
        is_from_start=config.prune.order == 'first',
    )


def calibration_samples(config: ConfigDict) -> int:
    """Return the number of calibration samples.

    The walk finds the kernels of a block by running it. So if no method has a statistic, and the recipe asks for no
    samples, one for each part of a batch runs, and its statistics are not used.

    Args:
      config: a recipe.
    """
    return config.prune.samples or config.mesh.data * config.mesh.fsdp


def text_format(config: ConfigDict) -> TextFormat:
    """Return how questions become tokens, and how answers are generated.

    Args:
      config: a recipe.

    Raises:
      DataError: the prompt's template does not have exactly one place for the question.
    """
    return TextFormat(**config.text.to_dict(), decoding=decoding(config))


def decoding(config: ConfigDict) -> dict[str, Any]:
    """Return the arguments of `generate`.

    Args:
      config: a recipe.
    """
    return {name: value for name, value in config.evaluate.to_dict().items() if name not in NO_DECODING}


def metric(config: ConfigDict) -> Metric:
    """Return the metric that a recipe names.

    Args:
      config: a recipe.

    Raises:
      ConfigError: `evaluate.metric` is not the name of a metric, or the metric has no title.
    """
    name = config.evaluate.metric
    try:
        chosen = METRICS.find(name)
    except UnknownNameError as error:
        raise ConfigError(f'evaluate.metric: {error}') from None
    # A class has the attributes of its instances, but calling it returns an instance instead of a score.
    if isinstance(chosen, type) or not isinstance(chosen, Metric):
        raise ConfigError(f'evaluate.metric: metric {name!r}: expected an object with a `title` that can be called')
    if not isinstance(chosen.title, str) or not chosen.title.strip():
        raise ConfigError(f'evaluate.metric: metric {name!r} has the title {chosen.title!r}: expected a text')
    return chosen


def task_names(config: ConfigDict) -> tuple[str, ...]:
    """Return the names of the tasks that a recipe scores its models on.

    Args:
      config: a recipe.

    Raises:
      ConfigError: a name is empty, occurs twice or is not known, or a task needs `evaluate.data_root`.
    """
    text = config.evaluate.tasks
    names = tuple(name.strip() for name in text.split(',')) if text else ()
    if len(set(names)) < len(names):
        raise ConfigError(f'evaluate.tasks {text!r}: a name occurs twice')
    for name in names:
        try:
            check_name(name)
        except DataError as error:
            raise ConfigError(f'evaluate.tasks: {error}') from None
        if not config.evaluate.data_root and not is_own_data(name):
            raise ConfigError(f'evaluate.tasks: {name} needs evaluate.data_root, the folder of its files')
    return names
