"""TextVQA (arXiv 1904.08920), version 0.5.1: {"data": [{"question_id", "question", "image_id", "answers", ...}]}.

The words that Rosetta has read in the images come in files of their own. If they are there, they become the context of
the questions, joined by ', '. Images of the validation split lie in `train_images`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparselora_jax.data.benchmarks import records
from sparselora_jax.data.benchmarks.items import ItemsBuilder
from sparselora_jax.data.benchmarks.json_stream import Entry, entries, for_each
from sparselora_jax.data.benchmarks.sniff import FileFacts, Head, facts, subset_in_name
from sparselora_jax.data.benchmarks.source import Source, choose, with_marks

# Kinds of files, see `sniff.FileFacts`.
QUESTIONS = 'text_vqa_questions'
WORDS = 'text_vqa_words'
SEPARATOR = ', '  # between the words of an image


def recognise(head: Head) -> FileFacts | None:
    """Return the facts of a file of questions, or of words, of TextVQA; None for other files.

    Args:
      head: the beginning of the file.
    """
    record = head.first('data') if 'data' in head.members else None
    if not isinstance(record, dict) or 'image_id' not in record:
        return None
    subset = str(record.get('set_name') or head.text('dataset_type'))
    # Other data sets have this form too, but not these keys.
    if {'question', 'question_id'} <= record.keys() and ('set_name' in record or 'flickr_300k_url' in record):
        return facts(head.path, QUESTIONS, subset=subset, first=str(record['question_id']))
    if 'ocr_tokens' in record:
        # The type of these files may be missing.
        subset = subset or subset_in_name(head.path, ('train', 'val', 'test'))
        return facts(head.path, WORDS, subset=subset, first=str(record['image_id']))
    return None


@dataclass(frozen=True)
class TextVqa:
    """Finds the files of a split; see `source.Finder`.

    Attributes:
      subset: 'val', for example.
    """

    subset: str

    def find(self, files: Sequence[FileFacts]) -> Source | None:
        """Return the file of questions, and that of words if it is there; None if there are no questions.

        Args:
          files: all data files that were recognised.

        Raises:
          DataError: several files could be meant.
        """
        chosen = choose(with_marks(files, QUESTIONS, subset=self.subset), f'questions of TextVQA, {self.subset}')
        if chosen is None:
            return None
        words = choose(with_marks(files, WORDS, subset=self.subset), f'words in the images of TextVQA, {self.subset}')
        words_path = words.path if words else None
        paths = (chosen.path,) if words_path is None else (chosen.path, words_path)
        return Source(paths, lambda builder: fill(builder, chosen.path, words_path), ('train_images', 'test_images'))


def fill(builder: ItemsBuilder, questions: Path, words: Path | None = None) -> None:
    """Add the questions of a split.

    Args:
      builder: where to add them.
      questions: the file of questions.
      words: the file of the words that the images show.

    Raises:
      DataError: a file is broken.
    """
    contexts: dict[str, str] = {}

    def read_words(entry: Entry) -> None:
        if entry.key == 'data':
            tokens = records.texts(entry.value, 'ocr_tokens')
            contexts[records.text(entry.value, 'image_id')] = SEPARATOR.join(tokens)

    def add(entry: Entry) -> None:
        if entry.key != 'data':
            return
        image_id = records.text(entry.value, 'image_id')
        builder.add(
            records.integer(entry.value, 'question_id'),
            builder.image_file(f'{image_id}.jpg', image_id),
            question=records.text(entry.value, 'question'),
            # The test split has no answers.
            references=records.optional_texts(entry.value, 'answers'),
            context=contexts.get(image_id, ''),
        )

    builder.has_read_words = True
    # First the words: questions need them.
    if words is not None:
        for_each(entries(words), words, read_words)
    for_each(entries(questions), questions, add)
