"""Describe what a run works with: versions, devices, dtype, mesh, model, data, processes."""

import importlib.metadata
import os
from typing import Any

import jax
from ml_collections import ConfigDict

from sparselora_jax import __version__
from sparselora_jax.jobs import names
from sparselora_jax.jobs.stored import Stored

# Packages whose versions are recorded.
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'transformers', 'safetensors', 'numpy')


def describe(config: ConfigDict) -> dict[str, Any]:
    """Return the description of a run in this process, as values that JSON can hold.

    Args:
      config: the recipe.
    """
    device = jax.devices()[0]
    return {
        'versions': {'sparselora-jax': __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        'platform': device.platform,
        'device_kind': device.device_kind,
        'devices': jax.device_count(),
        # The cores that this process may use; in a container these are fewer than the machine has.
        'cores': len(os.sched_getaffinity(0)),
        'processes': jax.process_count(),
        'dtype': config.dtype,
        'mesh': config.mesh.to_dict(),
        'model': config.model,
        'data': config.data,
    }


def header(environment: dict[str, Any]) -> str:
    """Return the description as one line.

    Args:
      environment: see `describe`.
    """
    versions = environment['versions']
    return (
        f'sparselora-jax {versions["sparselora-jax"]} (jax {versions["jax"]}, transformers {versions["transformers"]})'
        f' on {devices(environment)}: model {environment["model"]} in {environment["dtype"]}, '
        f'data {environment["data"]}, {mesh(environment)}'
    )


def devices(environment: dict[str, Any]) -> str:
    """Return the devices and processes of a description in words.

    Args:
      environment: see `describe`.
    """
    count = environment['devices']
    processes = environment['processes']
    kind = environment['device_kind']
    text = f'{count} {kind} device{"s" if count > 1 else ""}'
    if environment['platform'] == 'cpu':
        text += f' with {environment["cores"]} cores'
    return text if processes == 1 else f'{text} in {processes} processes'


def mesh(environment: dict[str, Any]) -> str:
    """Return the mesh of a description in words.

    Args:
      environment: see `describe`.
    """
    axes = environment['mesh']
    if set(axes.values()) == {1}:
        return 'no mesh'
    return 'mesh ' + ' x '.join(f'{name}={size}' for name, size in axes.items())


def record(stored: Stored, environment: dict[str, Any]) -> None:
    """Add a description to those in the workdir, unless it is there: a run may be resumed elsewhere.

    Args:
      stored: the files of a run.
      environment: see `describe`.
    """
    environments = recorded(stored)
    if environment not in environments:
        stored.write(names.ENVIRONMENTS, {'environments': [*environments, environment]})


def recorded(stored: Stored) -> list[dict[str, Any]]:
    """Return the descriptions of everything that has computed a stage of a run, the oldest first.

    Args:
      stored: the files of a run.

    Raises:
      StorageError: the file is damaged.
    """
    values = stored.read(names.ENVIRONMENTS, 'delete it; the report then lacks earlier devices')
    return [] if values is None else values['environments']
