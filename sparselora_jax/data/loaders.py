"""Find the loader of the data set that a recipe names, and register the built-in ones."""

import os

from sparselora_jax.data import easy_vqa, folder
from sparselora_jax.data.dataset import DATASETS, Loader
from sparselora_jax.runtime.registry import UnknownNameError

DATASETS.register('easy_vqa', easy_vqa.EasyVqaLoader())


def is_folder(data: str) -> bool:
    """Return whether a recipe's data are a folder, which need not exist.

    Args:
      data: see `find_loader`.

    >>> is_folder('easy_vqa'), is_folder('my_parts:PLAIN_COLOURS'), is_folder('photos')
    (False, False, True)
    """
    # A folder may have a colon in its name, so an existing path takes precedence over an import.
    is_import = ':' in data and not os.path.exists(data)
    return data not in DATASETS and not is_import


def find_loader(data: str) -> Loader:
    """Return the loader of the data set that a recipe names.

    Args:
      data: a registered name, a folder of images with a data.jsonl, or `package.module:Name`.

    Raises:
      UnknownNameError: `package.module:Name` cannot be imported, or is not a `Loader`.

    >>> find_loader('easy_vqa').kinds
    ('yes/no', 'shape', 'colour')
    """
    if is_folder(data):
        return folder.FolderLoader()
    loader = DATASETS.find(data)
    if isinstance(loader, type) or not isinstance(loader, Loader):
        raise UnknownNameError(f'data set {data!r}: expected an object with `kinds` that can be called (data.Loader)')
    return loader
