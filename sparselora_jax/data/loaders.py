"""Find the loader of the data set that a recipe names, and register the built-in ones."""

import os

from sparselora_jax.data import easy_vqa
from sparselora_jax.data.dataset import DATASETS, Loader
from sparselora_jax.data.mixture import MixtureLoader
from sparselora_jax.data.sources.place import IMAGES_MARK, absolute_names, split_names
from sparselora_jax.runtime.registry import UnknownNameError

DATASETS.register('easy_vqa', easy_vqa.EasyVqaLoader())


def is_path(data: str) -> bool:
    """Return whether a recipe's data are files or folders, which need not exist.

    Args:
      data: see `find_loader`.

    >>> is_path('easy_vqa'), is_path('my_parts:PLAIN_COLOURS'), is_path('photos'), is_path('captions.json::images')
    (False, False, True, True)
    """
    # A folder may have a colon in its name, so an existing path takes precedence over an import.
    is_import = ':' in data.replace(IMAGES_MARK, '') and not any(
        os.path.exists(name.path) for name in split_names(data)
    )
    return data not in DATASETS and not is_import


def absolute_data(data: str) -> str:
    """Return a recipe's data with absolute paths; names of data sets stay as they are.

    Args:
      data: see `find_loader`.
    """
    return absolute_names(data) if is_path(data) else data


def find_loader(data: str) -> Loader:
    """Return the loader of the data set that a recipe names.

    Args:
      data: a registered name, paths of sources separated by commas (`sources.place`), or `package.module:Name`.

    Raises:
      UnknownNameError: `package.module:Name` cannot be imported, or is not a `Loader`.

    >>> find_loader('easy_vqa').kinds
    ('yes/no', 'shape', 'colour')
    """
    if is_path(data):
        return MixtureLoader()
    loader = DATASETS.find(data)
    if isinstance(loader, type) or not isinstance(loader, Loader):
        raise UnknownNameError(f'data set {data!r}: expected an object with `kinds` that can be called (data.Loader)')
    return loader
