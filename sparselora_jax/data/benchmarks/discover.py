"""Find out what the data files under a folder hold: by the keys of their records, not by their names."""

from dataclasses import dataclass
from pathlib import Path

from sparselora_jax.data.benchmarks import (
    coco_captions,
    gqa,
    lavis,
    parquet,
    pope,
    science_qa,
    text_vqa,
    vizwiz,
    vqa_pair,
)
from sparselora_jax.data.benchmarks.picture_files import FileTree, list_files
from sparselora_jax.data.benchmarks.sniff import FileFacts, read_head
from sparselora_jax.runtime.errors import DataError

# Each returns the facts of a file, or None if its records have another form. The first that knows a file counts.
# Records of a list with an image and a question are the least distinct, so their recognisers come last.
RECOGNISERS = (
    vqa_pair.recognise,
    coco_captions.recognise,
    text_vqa.recognise,
    science_qa.recognise,
    pope.recognise,
    lavis.recognise,
    vizwiz.recognise,
    gqa.recognise,
)


@dataclass(frozen=True)
class Discovery:
    """What lies under a folder.

    Attributes:
      tree: the files.
      files: data files whose records are known.
      unknown: data files with other records.
      problems: files and folders that cannot be read, one line each.
    """

    tree: FileTree
    files: tuple[FileFacts, ...]
    unknown: tuple[Path, ...]
    problems: tuple[str, ...]


def discover(root: str | Path) -> Discovery:
    """List the files under a folder, and look at the head of each data file.

    Args:
      root: the folder.

    Raises:
      DataError: there is no such folder.
    """
    tree = list_files(root)
    files = []
    unknown = []
    problems = list(tree.problems)
    tables = [path for path in tree.data_files if path.suffix.lower() == '.parquet']
    for path in tree.data_files:
        if path in tables:
            continue
        try:
            facts = recognise(path)
        except DataError as error:
            # A broken file of something else must not be in the way of the benchmark in question.
            problems.append(str(error))
            continue
        if facts is None:
            unknown.append(path)
        else:
            files.append(facts)
    # Shards are sets of files, so parquet files are recognised together.
    facts_of_tables, problems_of_tables = parquet.recognise(tables)
    return Discovery(tree, (*files, *facts_of_tables), tuple(unknown), (*problems, *problems_of_tables))


def recognise(path: Path) -> FileFacts | None:
    """Return what a JSON file holds; None if its records are not known.

    Args:
      path: the file.

    Raises:
      DataError: its beginning cannot be read.
    """
    head = read_head(path)
    for recogniser in RECOGNISERS:
        facts = recogniser(head)
        if facts is not None:
            return facts
    # Perhaps the fault hides the keys that would tell.
    if head.fault is not None:
        raise head.fault
    return None
