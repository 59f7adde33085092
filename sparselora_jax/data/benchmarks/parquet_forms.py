"""The columns of Hugging Face data sets of benchmarks, and what a row of each means."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparselora_jax.data.benchmarks import gqa, pope, records, science_qa, text_vqa, vqa_pair
from sparselora_jax.data.benchmarks.items import ItemsBuilder
from sparselora_jax.data.benchmarks.lavis import id_of_image

IMAGE = 'image'  # the column of images

# Columns that a file lacks are absent from its rows.
Row = Mapping[str, object]


@dataclass(frozen=True)
class Form:
    """The columns of a data set, and what a row of it means.

    Attributes:
      kind: name of the form.
      columns: columns that tell the form from others.
      add: adds a row to a builder; called with the builder, the row, and its number, which is that of its image.
      optional: more columns that `add` reads if they are there.
      without: columns that another form with the same columns has.
    """

    kind: str
    columns: frozenset[str]
    add: Callable[[ItemsBuilder, Row, int], None]
    optional: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()

    @property
    def has_images(self) -> bool:
        """Return whether the rows hold images; otherwise they hold their names."""
        return IMAGE in self.columns


def _add_vqav2(builder: ItemsBuilder, row: Row, number: int) -> None:
    builder.image_ids.append(records.integer(row, 'image_id'))
    builder.add(
        records.whole_number(row, 'question_id'),
        number,
        question=records.text(row, 'question'),
        references=records.optional_texts(row, 'answers'),
        groups=vqa_pair.groups_of(row),
    )


def _add_ok_vqa(builder: ItemsBuilder, row: Row, number: int) -> None:
    # The column holds texts, but the published files, and so the evaluators, have integers.
    question_id = records.whole_number(row, 'question_id')
    # There is no column of the image's id; a question's id is that of its image and one more digit.
    builder.image_ids.append(question_id // 10)
    builder.add(
        question_id,
        number,
        question=records.text(row, 'question'),
        references=records.optional_texts(row, 'answers'),
        groups=vqa_pair.groups_of(row),
    )


def _add_text_vqa(builder: ItemsBuilder, row: Row, number: int) -> None:
    builder.has_read_words = True
    builder.image_ids.append(records.text(row, 'image_id'))
    builder.add(
        records.integer(row, 'question_id'),
        number,
        question=records.text(row, 'question'),
        references=records.optional_texts(row, 'answers'),
        context=text_vqa.SEPARATOR.join(records.optional_texts(row, 'ocr_tokens')),
    )


def _add_vizwiz(builder: ItemsBuilder, row: Row, number: int) -> None:
    # The id of a question is the name of its image.
    question_id = records.text(row, 'question_id')
    builder.image_ids.append(question_id)
    builder.add(
        question_id,
        number,
        question=records.text(row, 'question'),
        references=records.optional_texts(row, 'answers'),
        groups={'answer_type': records.optional_text(row, 'category')},
    )


# The rows have no ids, so a question is known by its place in the file.
def _add_science_qa(builder: ItemsBuilder, row: Row, number: int) -> None:
    # There is no column of ids. The number of the row among all questions of the split takes their place.
    builder.image_ids.append(number)
    choices = records.optional_texts(row, 'choices')
    builder.add(
        number,
        number,
        question=records.text(row, 'question'),
        references=(science_qa.letter_of(row, choices),),
        choices=choices,
        context=records.optional_text(row, 'hint'),
        groups=science_qa.groups_of(row),
    )


# Questions of the three categories have the same ids.
def _add_pope(builder: ItemsBuilder, row: Row, number: int) -> None:
    # The names of the images have no suffix here; `id_of_image` does not mind.
    category = records.text(row, 'category')
    builder.image_ids.append(id_of_image(records.text(row, 'image_source')))
    builder.add(
        f'{category}/{records.whole_number(row, "question_id")}',
        number,
        question=records.text(row, 'question'),
        references=(pope.yes_or_no(row, 'answer'),),
        groups={'category': category},
    )


def _add_nocaps(builder: ItemsBuilder, row: Row, number: int) -> None:
    # There is no column of domains, so scores by domain need the published file.
    image_id = records.integer(row, 'image_id')
    builder.image_ids.append(image_id)
    builder.add(image_id, number, references=records.optional_texts(row, 'annotations_captions'))


def _add_coco(builder: ItemsBuilder, row: Row, number: int) -> None:
    # The column `question` repeats one prompt in every row. It is no part of the benchmark.
    image_id = records.integer(row, 'id')
    builder.image_ids.append(image_id)
    builder.add(image_id, number, references=records.optional_texts(row, 'answer'))


# These rows name their images, whose files lie beside; the others hold them.
def _add_karpathy(builder: ItemsBuilder, row: Row, number: int) -> None:
    # Rows hold addresses of the images, not the images, so these must lie in a folder.
    image_id = records.integer(row, 'cocoid')
    name = f'{records.text(row, "filepath")}/{records.text(row, "filename")}'
    builder.add(image_id, builder.image_file(name, image_id), references=records.optional_texts(row, 'sentences'))


def _add_flickr30k(builder: ItemsBuilder, row: Row, number: int) -> None:
    # The ids in the columns number the rows of one release; the name of the file is the same in all releases.
    image_id = id_of_image(records.text(row, 'filename'))
    builder.image_ids.append(image_id)
    builder.add(image_id, number, references=records.optional_texts(row, 'caption'))


def _add_gqa(builder: ItemsBuilder, row: Row, number: int) -> None:
    # The image is a file, or a row of other parquet files; either is found later, by its id.
    image_id = records.text(row, 'imageId')
    answer = records.optional_text(row, 'answer')
    builder.add(
        records.text(row, 'id'),
        builder.image_file(f'{image_id}.jpg', image_id),
        question=records.text(row, 'question'),
        references=(answer,) if answer else (),
        groups=gqa.groups_of(row.get('types')),
    )


def _form(
    kind: str, columns: str, add: Callable[[ItemsBuilder, Row, int], None], *, optional: str = '', without: str = ''
) -> Form:
    return Form(kind, frozenset(columns.split()), add, frozenset(optional.split()), frozenset(without.split()))


# Data sets: lmms-lab/VQAv2, lmms-lab/OK-VQA and so on, and yerevann/coco-karpathy and nlphuji/flickr30k. Copies under
# other names have the same columns. Only columns that are needed are listed, because releases differ in the others.
VQAV2 = _form(
    'parquet_vqav2',
    'question_id image question answers question_type answer_type multiple_choice_answer image_id',
    _add_vqav2,
)
OK_VQA = _form(
    'parquet_ok_vqa',
    'question_id image question answers question_type answer_type',
    _add_ok_vqa,
    without='multiple_choice_answer',
)
# Older versions have no words of an OCR system.
TEXT_VQA = _form(
    'parquet_text_vqa',
    'image_id question_id question image answers set_name',
    _add_text_vqa,
    optional='ocr_tokens',
)
# The columns of many data sets include these five.
VIZWIZ = _form(
    'parquet_vizwiz', 'question_id image question answers category', _add_vizwiz, without='image_id answer_type'
)
SCIENCE_QA = _form(
    'parquet_science_qa', 'image question choices answer hint subject topic category grade', _add_science_qa
)
POPE = _form('parquet_pope', 'question_id image question answer image_source category', _add_pope)
NOCAPS = _form('parquet_nocaps', 'image image_id image_open_images_id annotations_captions', _add_nocaps)
COCO = _form('parquet_coco', 'image question answer id file_name coco_url', _add_coco)
KARPATHY = _form('parquet_karpathy', 'filepath filename cocoid split sentences', _add_karpathy, without='image')
# Some releases have a column of splits, in a file whose name says 'test' for all images.
FLICKR30K = _form('parquet_flickr30k', 'image caption filename', _add_flickr30k, optional='split')
# Its images lie in a data set of their own.
GQA = _form('parquet_gqa', 'id imageId question', _add_gqa, optional='answer types')
# The more columns a form has, the earlier it stands.
FORMS = (VQAV2, OK_VQA, TEXT_VQA, VIZWIZ, SCIENCE_QA, POPE, NOCAPS, COCO, KARPATHY, FLICKR30K, GQA)
