"""The layouts of data by name, and the one function that opens a source."""

from pathlib import Path

from sparselora_jax.data.sources.image_text_files import ImageTextFormat
from sparselora_jax.data.sources.json_files import JsonFormat
from sparselora_jax.data.sources.parquet_rows import SUFFIX as PARQUET_SUFFIX
from sparselora_jax.data.sources.parquet_rows import ParquetFormat, unknown_columns
from sparselora_jax.data.sources.place import IMAGES_MARK, Place, SourceName
from sparselora_jax.data.sources.source import SOURCES, OpenedSource
from sparselora_jax.data.sources.tables import TableFormat
from sparselora_jax.data.sources.tar_shards import TarFormat, is_compressed
from sparselora_jax.data.sources.text_files import TextFilesFormat
from sparselora_jax.data.sources.tfds_records import TfdsFormat
from sparselora_jax.data.sources.user_folder import UserFolderFormat
from sparselora_jax.runtime.errors import DataError

# The most telling layouts first: images with texts, and texts alone, may lie beside any of the others.
SOURCES.register('folder', UserFolderFormat())
SOURCES.register('tfds', TfdsFormat())
SOURCES.register('tar', TarFormat())
SOURCES.register('json', JsonFormat())
SOURCES.register('table', TableFormat())
SOURCES.register('parquet', ParquetFormat())
SOURCES.register('files', ImageTextFormat())
SOURCES.register('text', TextFilesFormat())


def open_source(name: SourceName, *, index_dir: Path | None = None, tolerance: float = 0.0) -> OpenedSource:
    """Return the source that a name names; its layout is recognised by its files and their keys.

    Args:
      name: the name of the source.
      index_dir: folder in which an index of large files is kept; None: none is kept.
      tolerance: largest share of the images that may be missing; their records are left out.

    Raises:
      DataError: there is no such file or folder, its layout is not known, or its files are broken.
    """
    path = Path(name.path)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # a null byte, or a name that is too long
        raise DataError(f'{path}: not a path ({getattr(error, "strerror", None) or error})') from None
    if not exists:
        raise DataError(f'{path}: no such file or folder')
    # A pipe or a device is neither: it would be read for ever.
    if not path.is_file() and not path.is_dir():
        raise DataError(f'{path}: neither a file nor a folder')
    images = Path(name.images) if name.images else None
    if images is not None and not images.is_dir():
        raise DataError(f'{images}: no such folder; name the folder of the images after {IMAGES_MARK}')
    place = Place(path, images, index_dir, tolerance)
    formats = [SOURCES.find(format_name) for format_name in SOURCES]
    # Where a folder of images is named, only layouts that have one are meant.
    formats = [known for known in formats if images is None or known.takes_images]
    for known in formats:
        source = known.open(place)
        if source is not None:
            return source
    titles = '; '.join(known.title for known in formats)
    tables = [file for file in place.tree.data_files if file.suffix.lower() == PARQUET_SUFFIX] if path.is_dir() else []
    if tables:
        raise unknown_columns(tables[0])
    compressed = [file for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if is_compressed(file)]
    if compressed:
        raise DataError(f'{compressed[0]}: a compressed tar file, whose members have no places; unpack it')
    raise DataError(f'{path}: no data of a layout that is known: {titles}')
