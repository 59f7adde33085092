"""A user's own benchmark: a folder of images with a `data.jsonl`, one JSON object per line.

For example::

    {"image": "cats/1.png", "question": "What colour is it?", "references": ["teal", "blue"], "metric": "vqa"}
    {"image": "cats/2.png", "question": "Is it asleep?", "references": ["yes"], "groups": {"kind": "yes/no"}}
    {"image": "cats/2.png", "references": ["a cat on a mat", "a sleeping cat"], "id": "caption-2"}

- `image`: path of the image relative to the folder
- `question`, or `prompt`: the question; none for a caption
- `references`, or `answers`, or `answer`: a list of texts, or one text; none if they are not known
- `id`: a text or a number; the number of the line if no line has one
- `choices`, `context`, `groups`: see `items.Item`
- `metric`: name of the metric that scores the answers; all lines that have it say the same
- `split`: lines of the split 'train' are left out, so that a folder that a model was trained on can be evaluated
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from sparselora_jax.data.benchmarks import records
from sparselora_jax.data.benchmarks.items import ItemsBuilder
from sparselora_jax.data.benchmarks.json_stream import Entry, for_each, lines
from sparselora_jax.runtime.errors import DataError

FILE = 'data.jsonl'
# A folder that a recipe trains on has `prompt` and `answer`; it can be evaluated as it is.
_QUESTIONS = ('question', 'prompt')
_REFERENCES = ('references', 'answers', 'answer')


def find_file(path: str | Path) -> Path | None:
    """Return the file of JSON lines that a path names, itself or as its folder; None if it names none.

    Args:
      path: a file or a folder.
    """
    path = Path(path)
    if path.suffix == '.jsonl' and path.is_file():
        return path
    return path / FILE if (path / FILE).is_file() else None


def fill(builder: ItemsBuilder, path: Path) -> None:
    """Add the lines of a file.

    Args:
      builder: where to add them.
      path: the file.

    Raises:
      DataError: a line is broken, or the lines name several metrics.
    """

    def add(entry: Entry) -> None:
        record = entry.value
        # './a.png' and 'a.png' are one image.
        image = PurePosixPath(records.text(record, 'image')).as_posix()
        if record.get('split') == 'train':
            return
        _take_metric(builder, records.optional_text(record, 'metric'))
        question_field = _only_field(record, _QUESTIONS)
        builder.add(
            records.number_or_text(record, 'id') if 'id' in record else entry.index,
            builder.image_file(image, image),
            question=records.text(record, question_field) if question_field else None,
            references=_references(record),
            choices=records.texts(record, 'choices') if record.get('choices') is not None else (),
            context=records.optional_text(record, 'context'),
            groups=_groups(record),
        )

    for_each(lines(path), path, add)
    if not len(builder):
        raise DataError(f'{path}: no line to evaluate; see sparselora_jax/data/benchmarks/user_jsonl.py for its format')


def _take_metric(builder: ItemsBuilder, metric: str) -> None:
    if metric and builder.metric and metric != builder.metric:
        raise DataError(f'metric is {metric!r}, but an earlier line says {builder.metric!r}; use one file for each')
    # A line without a metric does not take back that of an earlier one.
    builder.metric = metric or builder.metric


# Two of these fields may contradict each other, and choosing one silently would change scores.
def _only_field(record: Mapping, names: tuple[str, ...]) -> str:
    """Return which of several fields a line has; '' if it has none."""
    present = [name for name in names if record.get(name) is not None]
    if len(present) > 1:
        raise DataError(f'both {present[0]} and {present[1]}, expected one of them')
    return present[0] if present else ''


def _references(record: Mapping) -> tuple[str, ...]:
    name = _only_field(record, _REFERENCES)
    if not name:
        return ()
    # One text is a list of one.
    return (record[name],) if isinstance(record[name], str) else records.texts(record, name)


def _groups(record: Mapping) -> dict[str, str]:
    groups = record.get('groups')
    if groups is None:
        return {}
    if not isinstance(groups, dict):
        raise DataError(f'groups is {records.quote(groups)}, not an object')
    return {name: records.text(groups, name) for name in groups}
