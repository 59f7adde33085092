"""Writes small data sets in the layout of each official release, and says what a reader must return.

Names of files and folders, keys, types and the order of keys are those of the releases; counts are scaled down. Images
are real JPEG and PNG files of some pixels.
"""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WORDS = ('red', 'two', 'a dog', 'yes', 'no', 'caf\u00e9', 'on the table', 'n\u00e9on "sign"', '\u6c34', 'racing')
OK_VQA_CATEGORIES = {'one': 'Vehicles and Transportation', 'four': 'Sports and Recreation'}


@dataclass
class Expected:
    """What a reader must return for one item."""

    id: int | str
    image_id: int | str
    image: bytes  # the image file
    question: str | None = None
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    context: str = ''
    groups: dict[str, str] = field(default_factory=dict)

    @property
    def pixels(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.image)).convert('RGB'))


def image(seed: int, suffix: str = '.jpg') -> bytes:
    """Return a small image file that differs for each seed."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (6 + seed % 3, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {'.jpg': 'JPEG', '.png': 'PNG'}[suffix])
    return file.getvalue()


def write(path: Path, value: object) -> Path:
    """Write a file: bytes as they are, a list of lines as JSON lines if the name says so, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif path.suffix == '.jsonl' or path.name.startswith('coco_pope'):
        path.write_text(''.join(json.dumps(line) + '\n' for line in value))
    else:
        path.write_text(json.dumps(value))
    return path


def answers_of(seed: int, count: int = 10) -> list[str]:
    """Return the answers of one question: some agree, as those of people do."""
    rng = np.random.default_rng(seed)
    return [WORDS[index] for index in rng.integers(0, 4, count) + seed % 6]


def captions_of(seed: int, count: int = 5) -> list[str]:
    return [f'A {WORDS[(seed + place) % len(WORDS)]} is here, number {seed}.{place}' for place in range(count)]


INFO = {
    'description': 'This is v2.0 of the VQA dataset.',
    'url': 'http://visualqa.org',
    'version': '2.0',
    'year': 2017,
    'contributor': 'VQA Team',
    'date_created': '2017-04-26 17:07:13',
}
LICENSE = {'url': 'http://creativecommons.org/licenses/by/4.0/', 'name': 'Creative Commons Attribution 4.0'}


def vqa_questions(subset: str, questions: list[dict]) -> dict:
    return {
        'info': INFO,
        'task_type': 'Open-Ended',
        'data_type': 'mscoco',
        'license': LICENSE,
        'data_subtype': subset,
        'questions': questions,
    }


def vqa_annotations(subset: str, annotations: list[dict]) -> dict:
    return {
        'info': INFO,
        'license': LICENSE,
        'data_subtype': subset,
        'annotations': annotations,
        'data_type': 'mscoco',
    }


def coco_file(image_id: int, subset: str = 'val2014') -> str:
    return f'COCO_{subset}_{image_id:012d}.jpg'


def vqav2(root: Path, subset: str = 'val2014', images: int = 4, first_image: int = 262148) -> list[Expected]:
    """Write a split of VQAv2, with annotations if it is a train or val split."""
    folder = subset.replace('test-dev', 'test')
    has_answers = 'test' not in subset
    expected = []
    questions = []
    annotations = []
    for number in range(images):
        image_id = first_image + 17 * number
        data = image(image_id)
        write(root / folder / coco_file(image_id, folder), data)
        for place in range(1 + number % 3):
            question_id = image_id * 1000 + place
            question = f'What is {WORDS[(number + place) % len(WORDS)]} in picture {number}?'
            answers = answers_of(question_id)
            groups = {'answer_type': ('yes/no', 'number', 'other')[place], 'question_type': 'what is'}
            questions.append({'image_id': image_id, 'question': question, 'question_id': question_id})
            annotations.append(
                {
                    'question_type': groups['question_type'],
                    'multiple_choice_answer': answers[0],
                    'answers': [
                        {'answer': answer, 'answer_confidence': 'maybe', 'answer_id': rank}
                        for rank, answer in enumerate(answers, start=1)
                    ],
                    'image_id': image_id,
                    'answer_type': groups['answer_type'],
                    'question_id': question_id,
                }
            )
            item = Expected(question_id, image_id, data, question)
            if has_answers:
                item.references = tuple(answers)
                item.groups = groups
            expected.append(item)
    write(root / f'v2_OpenEnded_mscoco_{subset}_questions.json', vqa_questions(subset, questions))
    if has_answers:
        write(root / f'v2_mscoco_{subset}_annotations.json', vqa_annotations(subset, annotations))
    return expected


def ok_vqa(root: Path, subset: str = 'val2014', images: int = 3) -> list[Expected]:
    expected = []
    questions = []
    annotations = []
    for number in range(images):
        image_id = 297147 + number
        data = image(image_id)
        write(root / subset / coco_file(image_id, subset), data)
        question_id = image_id * 10 + 5
        question = f'What sport can you use this for, {number}?'
        code = list(OK_VQA_CATEGORIES)[number % 2]
        stemmed = [f'{answer}-stem' for answer in answers_of(number, 5) for _ in range(2)]
        questions.append({'image_id': image_id, 'question': question, 'question_id': question_id})
        annotations.append(
            {
                'image_id': image_id,
                'answer_type': 'other',
                'question_type': code,
                'question_id': question_id,
                'answers': [
                    {'answer_id': rank, 'raw_answer': f'raw {answer}', 'answer_confidence': 'yes', 'answer': answer}
                    for rank, answer in enumerate(stemmed, start=1)
                ],
                'confidence': 3,
            }
        )
        groups = {'answer_type': 'other', 'question_type': code, 'category': OK_VQA_CATEGORIES[code]}
        expected.append(Expected(question_id, image_id, data, question, tuple(stemmed), groups=groups))
    write(root / f'OpenEnded_mscoco_{subset}_questions.json', vqa_questions(subset, questions))
    write(root / f'mscoco_{subset}_annotations.json', vqa_annotations(subset, annotations))
    return expected


def lavis_questions(path: Path, items: list[Expected], subset: str = 'val2014') -> list[Expected]:
    """Write LAVIS's list of the questions of a split, and return the items without their groups."""
    folder = subset.replace('test-dev', 'test')
    rows = []
    for item in items:
        row = {
            'question_id': item.id,
            'question': item.question,
            'answer': list(item.references),
            'image': f'{folder}/{coco_file(item.image_id, folder)}',
            'dataset': 'vqa',
        }
        if not item.references:
            del row['answer']
        rows.append(row)
    write(path, rows)
    return [Expected(item.id, item.image_id, item.image, item.question, item.references) for item in items]


def gqa(root: Path, subset: str = 'testdev', count: int = 4, *, has_answers: bool = True) -> list[Expected]:
    expected = []
    questions = {}
    for number in range(count):
        # Two questions each about an image.
        image_id = f'{"n" if subset == "testdev" else ""}{161313 + number // 2}'
        data = image(161313 + number // 2)
        write(root / 'images' / f'{image_id}.jpg', data)
        question_id = f'0{20968379 + number}'
        question = f'Is the {WORDS[number]} left of the man?'
        groups = {'structural': 'verify', 'semantic': 'rel', 'detailed': 'relVerify'}
        questions[question_id] = {
            'semantic': [{'operation': 'select', 'dependencies': [], 'argument': 'man (0)'}],
            'entailed': [],
            'equivalent': [question_id],
            'question': question,
            'imageId': image_id,
            'isBalanced': True,
            'groups': {'global': None, 'local': '13-man_hat'},
            'answer': 'no',
            'semanticStr': 'select: man (0)',
            'annotations': {'answer': {}, 'question': {'4': '0'}, 'fullAnswer': {'4': '0'}},
            'types': groups,
            'fullAnswer': 'No, it is not.',
        }
        if not has_answers:
            del questions[question_id]['answer'], questions[question_id]['fullAnswer']
        references = ('no',) if has_answers else ()
        expected.append(Expected(question_id, image_id, data, question, references, groups=groups))
    write(root / f'{subset}_balanced_questions.json', questions)
    unbalanced = {f'1{key}': record | {'isBalanced': False} for key, record in questions.items()}
    write(root / f'{subset}_all_questions.json', unbalanced | questions)
    return expected


def lavis_gqa(path: Path, items: list[Expected]) -> list[Expected]:
    write(
        path,
        [
            {
                'image': f'{item.image_id}.jpg',
                'question': item.question,
                'question_id': int(item.id),
                'answer': item.references[0],
            }
            for item in items
        ],
    )
    return [Expected(str(int(item.id)), item.image_id, item.image, item.question, item.references) for item in items]


def coco_captions(root: Path, subset: str = 'val2014', count: int = 3, first_image: int = 391895) -> list[Expected]:
    """Write a file of COCO's captions, and the files of boxes and key points that lie beside it in the release."""
    expected = []
    images = []
    annotations = []
    for number in range(count):
        image_id = first_image + 11 * number
        data = image(image_id)
        name = f'{image_id:012d}.jpg' if '2017' in subset else coco_file(image_id, subset)
        write(root / subset / name, data)
        captions = captions_of(number, 5 + number % 2)
        images.append(
            {
                'license': 3,
                'file_name': name,
                'coco_url': f'http://images.cocodataset.org/{subset}/{name}',
                'height': 360,
                'width': 640,
                'date_captured': '2013-11-14 11:18:45',
                'flickr_url': 'http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg',
                'id': image_id,
            }
        )
        annotations += [
            {'image_id': image_id, 'id': 771337 + 100 * place + number, 'caption': caption}
            for place, caption in enumerate(captions)
        ]
        expected.append(Expected(image_id, image_id, data, references=tuple(captions)))
    # In the release, the captions of an image do not follow each other.
    annotations.sort(key=lambda annotation: annotation['id'])
    head = {'info': {'description': 'COCO 2014 Dataset', 'year': 2014}, 'images': images}
    licenses = [{'url': 'http://creativecommons.org/licenses/by-nc-sa/2.0/', 'id': 1, 'name': 'A licence'}]
    write(root / 'annotations' / f'captions_{subset}.json', head | {'licenses': licenses, 'annotations': annotations})
    boxes = [
        {
            'segmentation': [[239.97, 260.24]],
            'area': 2765.1,
            'iscrowd': 0,
            'image_id': image_id,
            'bbox': [199.84, 200.46, 77.71, 70.88],
            'category_id': 58,
            'id': 156,
        }
        for image_id in (first_image, first_image + 11)
    ]
    categories = [{'supercategory': 'person', 'id': 1, 'name': 'person'}]
    instances = head | {'licenses': licenses, 'annotations': boxes, 'categories': categories}
    write(root / 'annotations' / f'instances_{subset}.json', instances)
    return expected


def karpathy(
    path: Path, image_root: Path, data_set: str, splits: tuple[str, ...] = ('test', 'val', 'train', 'test')
) -> dict[str, list[Expected]]:
    """Write a file in Karpathy's form, and return the items of each split."""
    expected: dict[str, list[Expected]] = {}
    images = []
    for number, split in enumerate(splits):
        identifier = 391895 + number if data_set == 'coco' else 1007129816 + number
        name = coco_file(identifier) if data_set == 'coco' else f'{identifier}.jpg'
        data = image(identifier)
        folder = 'val2014' if data_set == 'coco' else 'flickr30k-images'
        write(image_root / folder / name, data)
        captions = captions_of(number)
        record = {
            'sentids': [5 * number + place for place in range(5)],
            'imgid': number,
            'sentences': [
                {
                    'tokens': caption.lower().split(),
                    'raw': caption,
                    'imgid': number,
                    'sentid': 5 * number + place,
                }
                for place, caption in enumerate(captions)
            ],
            'split': split,
            'filename': name,
        }
        if data_set == 'coco':
            record = {'filepath': 'val2014'} | record | {'cocoid': identifier}
        images.append(record)
        expected.setdefault(split, []).append(Expected(identifier, identifier, data, references=tuple(captions)))
    write(path, {'images': images, 'dataset': data_set})
    return expected


def lavis_captions(path: Path, items: list[Expected], folder: str) -> list[Expected]:
    def name(item: Expected) -> str:
        return coco_file(item.image_id) if folder == 'val2014' else f'{item.image_id}.jpg'

    write(path, [{'image': f'{folder}/{name(item)}', 'caption': list(item.references)} for item in items])
    return items


def nocaps(root: Path, count: int = 3, *, has_domains: bool = True) -> list[Expected]:
    expected = []
    images = []
    annotations = []
    for number in range(count):
        open_images_id = f'00{13 + number}ea2087020901'
        data = image(number)
        write(root / 'images' / f'{open_images_id}.jpg', data)
        domain = ('in-domain', 'near-domain', 'out-domain')[number % 3]
        captions = captions_of(number, 10)
        record = {
            'license': 0,
            'open_images_id': open_images_id,
            'file_name': f'{open_images_id}.jpg',
            'height': 732,
            'date_captured': '2018-11-06 11:04:33',
            'id': number,
            'width': 1024,
            'coco_url': f'https://s3.amazonaws.com/nocaps/val/{open_images_id}.jpg',
        }
        groups = {}
        if has_domains:
            record['domain'] = domain
            groups['domain'] = domain
        images.append(record)
        annotations += [
            {'image_id': number, 'id': 10 * number + place, 'caption': caption}
            for place, caption in enumerate(captions)
        ]
        expected.append(Expected(number, number, data, references=tuple(captions), groups=groups))
    head = {'licenses': [], 'info': {'description': 'nocaps validation', 'year': 2018}, 'images': images}
    write(root / 'nocaps_val_4500_captions.json', head | {'annotations': annotations})
    write(root / 'nocaps_val_image_info.json', head)
    test = [image_info | {'id': 4500 + number} for number, image_info in enumerate(images)]
    write(root / 'nocaps_test_image_info.json', head | {'images': test})
    return expected


def text_vqa(root: Path, subset: str = 'val', count: int = 3, *, has_words: bool = True) -> list[Expected]:
    expected = []
    data_rows = []
    words = []
    for number in range(count):
        image_id = f'003a8ae2ef43b90{number}'
        data = image(number)
        # Images of the validation split lie in the folder of the training images, as in the release.
        folder = 'test_images' if subset == 'test' else 'train_images'
        write(root / folder / f'{image_id}.jpg', data)
        question = f'what is the brand of this camera {number}?'
        row = {
            'question': question,
            'image_id': image_id,
            'image_classes': ['Cassette deck', 'Printer'],
            'flickr_original_url': 'https://farm2.staticflickr.com/4/5566811_bc00d504a6_o.jpg',
            'flickr_300k_url': 'https://farm2.staticflickr.com/4/5566811_bc00d504a6_z.jpg',
            'image_width': 1024,
            'image_height': 664,
            'answers': answers_of(number),
            'question_tokens': question.strip('?').split(),
            'question_id': 34602 + number,
            'set_name': subset,
        }
        if subset == 'test':
            del row['answers']
        data_rows.append(row)
        tokens = ['NOKIA', str(number)]
        words.append({'image_id': image_id, 'ocr_tokens': tokens, 'ocr_info': [{'word': 'NOKIA'}]})
        expected.append(
            Expected(
                34602 + number,
                image_id,
                data,
                question,
                tuple(row.get('answers', ())),
                context=', '.join(tokens) if has_words else '',
            )
        )
    head = {'dataset_type': subset, 'dataset_name': 'textvqa', 'dataset_version': '0.5.1'}
    write(root / f'TextVQA_0.5.1_{subset}.json', head | {'data': data_rows})
    if has_words:
        head = {'dataset_type': subset, 'dataset_name': 'textvqa_ocr_rosetta', 'dataset_version': '0.2'}
        write(root / f'TextVQA_Rosetta_OCR_v0.2_{subset}.json', head | {'data': words})
    return expected


def vizwiz(root: Path, subset: str = 'val', count: int = 3) -> list[Expected]:
    expected = []
    rows = []
    for number in range(count):
        name = f'VizWiz_{subset}_{number:08d}.jpg'
        data = image(number)
        write(root / subset / name, data)
        question = f'Ok. There is another picture I hope it is better, {number}?'
        row = {'image': name, 'question': question}
        item = Expected(name, name, data, question)
        if subset != 'test':
            answers = answers_of(number)
            answer_type = ('unanswerable', 'other')[number % 2]
            row['answers'] = [{'answer_confidence': 'yes', 'answer': answer} for answer in answers]
            row['answer_type'] = answer_type
            row['answerable'] = number % 2
            item.references = tuple(answers)
            item.groups = {'answer_type': answer_type, 'answerable': ('no', 'yes')[number % 2]}
        rows.append(row)
        expected.append(item)
    write(root / f'{subset}.json', rows)
    return expected


def science_qa(root: Path, subset: str = 'test', *, has_splits: bool = True, unused_ids: int = 0) -> list[Expected]:
    """Write ScienceQA with a question without image, and one of another split.

    Args:
      root: where to write.
      subset: the split of the other questions.
      has_splits: whether to write the file of splits.
      unused_ids: number of ids of the training split that are not written; the release has thousands of them, so that
        the later splits are far from the beginning of the file.
    """
    expected = []
    problems = {}
    splits = {'train': [], 'val': [], 'test': [], 'trainval': [], 'minival': [], 'minitest': []}
    kinds = [(subset, True), (subset, False), ('train', True), (subset, True), ('val', False)]
    for number, (split, has_image) in enumerate(kinds):
        identifier = str(11 + number)
        data = image(number, '.png')
        if has_image:
            write(root / split / identifier / 'image.png', data)
        groups = {'subject': 'natural science', 'topic': 'physics', 'category': 'Magnets', 'grade': f'grade{number}'}
        problem = {
            'question': f'Which property do these {number} objects have in common?',
            'choices': ['hard', 'soft', 'yellow'][: 2 + number % 2],
            'answer': number % 2,
            'hint': 'Select the better answer.' if number else '',
            'image': 'image.png' if has_image else None,
            'task': 'closed choice',
            'skill': 'Compare properties of objects',
            'lecture': 'An object has different properties.',
            'solution': 'Look at each object.',
            'split': split,
        }
        problems[identifier] = problem | groups
        splits[split].append(identifier)
        if split == subset and has_image:
            expected.append(
                Expected(
                    identifier,
                    identifier,
                    data,
                    problem['question'],
                    ('AB'[number % 2],),
                    tuple(problem['choices']),
                    problem['hint'],
                    groups,
                )
            )
    splits['train'] += [str(20_000 + number) for number in range(unused_ids)]
    splits['trainval'] = splits['train'] + splits['val']
    splits['minival'] = splits['val'][:1]
    splits['minitest'] = splits['test'][:1]
    write(root / 'problems.json', problems)
    if has_splits:
        write(root / 'pid_splits.json', splits)
    return expected


def pope(root: Path, image_root: Path, count: int = 2) -> list[Expected]:
    expected = []
    for category in ('random', 'popular', 'adversarial'):
        rows = []
        for number in range(count):
            image_id = 310196 + number
            data = image(image_id)
            write(image_root / 'val2014' / coco_file(image_id), data)
            question = f'Is there a {category} snowboard in the image?'
            label = ('yes', 'no')[number % 2]
            rows.append({'question_id': number + 1, 'image': coco_file(image_id), 'text': question, 'label': label})
            expected.append(
                Expected(f'{category}/{number + 1}', image_id, data, question, (label,), groups={'category': category})
            )
        write(root / f'coco_pope_{category}.json', rows)
    return expected


IMAGE_TYPE = pa.struct([('bytes', pa.binary()), ('path', pa.string())])


def table(folder: Path, split: str, rows: list[dict], shards: int = 2, group: int = 2) -> list[Path]:
    """Write rows as Hugging Face does: shards with row groups, and images as structs of bytes and path."""
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.Table.from_pylist(rows).schema
    if 'image' in schema.names:
        schema = schema.set(schema.get_field_index('image'), pa.field('image', IMAGE_TYPE))
    for shard in range(shards):
        first = shard * len(rows) // shards
        last = (shard + 1) * len(rows) // shards
        path = folder / f'{split}-{shard:05d}-of-{shards:05d}.parquet'
        pq.write_table(pa.Table.from_pylist(rows[first:last], schema), path, row_group_size=group)
        paths.append(path)
    return paths


def parquet_image(item: Expected) -> dict:
    return {'bytes': item.image, 'path': f'{item.image_id}.jpg'}


def parquet_vqav2(folder: Path, items: list[Expected], split: str = 'validation') -> list[Expected]:
    rows = []
    for item in items:
        answers = [
            {'answer': answer, 'answer_confidence': 'yes', 'answer_id': rank}
            for rank, answer in enumerate(item.references, start=1)
        ]
        rows.append(
            {
                'question_type': item.groups.get('question_type'),
                'multiple_choice_answer': item.references[0] if item.references else None,
                'answers': answers or None,
                'image_id': item.image_id,
                'answer_type': item.groups.get('answer_type'),
                'question_id': item.id,
                'question': item.question,
                'image': parquet_image(item),
            }
        )
    table(folder / 'data', split, rows)
    return items


def parquet_ok_vqa(folder: Path, items: list[Expected]) -> list[Expected]:
    rows = [
        {
            'question_id': str(item.id),
            'image': parquet_image(item),
            'question': item.question,
            'answers': list(item.references),
            'question_type': item.groups['question_type'],
            'answer_type': item.groups['answer_type'],
        }
        for item in items
    ]
    table(folder / 'data', 'val2014', rows)
    return items


def parquet_gqa(folder: Path, items: list[Expected], subset: str = 'testdev') -> list[Expected]:
    rows = [
        {
            'id': item.id,
            'imageId': item.image_id,
            'question': item.question,
            'answer': item.references[0],
            'fullAnswer': 'No.',
            'isBalanced': True,
            'groups': {'global': None, 'local': 'a'},
            'entailed': None,
            'equivalent': None,
            'types': item.groups,
            'annotations': {'question': []},
            'semantic': [{'operation': 'select', 'argument': 'man (0)', 'dependencies': []}],
            'semanticStr': 'select: man (0)',
        }
        for item in items
    ]
    table(folder / f'{subset}_balanced_instructions', subset, rows, shards=1)
    by_id = {item.image_id: item for item in reversed(items)}
    images = [{'id': identifier, 'image': parquet_image(item)} for identifier, item in by_id.items()]
    table(folder / f'{subset}_balanced_images', subset, images)
    return items


def parquet_coco(folder: Path, items: list[Expected], subset: str = 'val2014') -> list[Expected]:
    rows = []
    for item in items:
        name = f'{item.image_id:012d}.jpg' if '2017' in subset else coco_file(item.image_id, subset)
        rows.append(
            {
                'question_id': name,
                'image': parquet_image(item),
                'question': 'Please carefully observe the image and come up with a caption for the image',
                'answer': list(item.references),
                'id': item.image_id,
                'license': 3,
                'file_name': name,
                'coco_url': f'http://images.cocodataset.org/{subset}/{name}',
                'height': 360,
                'width': 640,
                'date_captured': '2013-11-14 11:18:45',
            }
        )
    table(folder / 'data', 'val', rows)
    return items


def parquet_karpathy(folder: Path, items: dict[str, list[Expected]]) -> None:
    rows = [
        {
            'filepath': 'val2014',
            'sentids': [1, 2, 3, 4, 5],
            'filename': coco_file(item.image_id),
            'imgid': 7,
            'split': split,
            'sentences': list(item.references),
            'cocoid': item.image_id,
            'url': 'http://images.cocodataset.org/val2014/' + coco_file(item.image_id),
        }
        for split in ('val', 'test')
        for item in items[split]
    ]
    for name, split in (('validation', 'val'), ('test', 'test')):
        table(folder / 'data', name, [row for row in rows if row['split'] == split], shards=1)


def parquet_nocaps(folder: Path, items: list[Expected]) -> list[Expected]:
    rows = [
        {
            'image': parquet_image(item),
            'image_coco_url': 'https://s3.amazonaws.com/nocaps/val/0013ea2087020901.jpg',
            'image_date_captured': '2018-11-06 11:04:33',
            'image_file_name': '0013ea2087020901.jpg',
            'image_height': 732,
            'image_width': 1024,
            'image_id': item.image_id,
            'image_license': 0,
            'image_open_images_id': '0013ea2087020901',
            'annotations_ids': list(range(len(item.references))),
            'annotations_captions': list(item.references),
        }
        for item in items
    ]
    table(folder / 'data', 'validation', rows)
    return [Expected(item.id, item.image_id, item.image, references=item.references) for item in items]


def parquet_flickr30k(folder: Path, items: dict[str, list[Expected]]) -> list[Expected]:
    rows = [
        {
            'image': parquet_image(item),
            'caption': list(item.references),
            'sentids': ['0', '1', '2', '3', '4'],
            'split': split,
            'img_id': str(number),
            'filename': f'{item.image_id}.jpg',
        }
        for split in items
        for number, item in enumerate(items[split])
    ]
    table(folder / 'data', 'test', rows)
    return items['test']


def parquet_text_vqa(folder: Path, items: list[Expected]) -> list[Expected]:
    rows = [
        {
            'image_id': item.image_id,
            'question_id': item.id,
            'question': item.question,
            'question_tokens': item.question.split(),
            'image': parquet_image(item),
            'image_width': 1024,
            'image_height': 664,
            'flickr_original_url': 'https://farm2.staticflickr.com/4/5566811_bc00d504a6_o.jpg',
            'flickr_300k_url': 'https://farm2.staticflickr.com/4/5566811_bc00d504a6_z.jpg',
            'answers': list(item.references),
            'image_classes': ['Printer'],
            'set_name': 'val',
            'ocr_tokens': item.context.split(', '),
        }
        for item in items
    ]
    table(folder / 'data', 'validation', rows)
    return items


def parquet_vizwiz(folder: Path, items: list[Expected]) -> list[Expected]:
    rows = [
        {
            'question_id': item.id,
            'image': parquet_image(item),
            'question': item.question,
            'answers': list(item.references),
            'category': item.groups['answer_type'],
        }
        for item in items
    ]
    table(folder / 'data', 'val', rows)
    return [
        Expected(
            item.id,
            item.image_id,
            item.image,
            item.question,
            item.references,
            groups={'answer_type': item.groups['answer_type']},
        )
        for item in items
    ]


def parquet_science_qa(folder: Path, items: list[Expected]) -> list[Expected]:
    """Write the questions with a question without image before them."""
    rows = [
        {
            'image': parquet_image(item),
            'question': item.question,
            'choices': list(item.choices),
            'answer': 'ABC'.index(item.references[0]),
            'hint': item.context,
            'task': 'closed choice',
            'skill': 'Compare properties of objects',
            'lecture': '',
            'solution': '',
            **item.groups,
        }
        for item in (items[0], *items)
    ]
    rows[0]['image'] = None
    table(folder / 'data', 'test', rows, shards=1)
    return [
        Expected(row, row, item.image, item.question, item.references, item.choices, item.context, dict(item.groups))
        for row, item in enumerate(items, start=1)
    ]


def parquet_pope(folder: Path, items: list[Expected]) -> list[Expected]:
    rows = [
        {
            'id': str(number),
            'question_id': item.id.partition('/')[2],
            'question': item.question,
            'answer': item.references[0],
            'image_source': coco_file(item.image_id).removesuffix('.jpg'),
            'image': parquet_image(item),
            'category': item.groups['category'],
        }
        for number, item in enumerate(items)
    ]
    table(folder / 'data', 'test', rows)
    return items


def everything(root: Path) -> dict[str, list[Expected]]:
    """Write all benchmarks in their published form under one folder, as a user of several has them."""
    coco = root / 'coco'
    karpathy_coco = karpathy(root / 'caption_datasets' / 'dataset_coco.json', coco, 'coco')
    karpathy_flickr = karpathy(root / 'caption_datasets' / 'dataset_flickr30k.json', root / 'flickr30k', 'flickr30k')
    karpathy(root / 'caption_datasets' / 'dataset_flickr8k.json', root / 'flickr8k', 'flickr8k')
    vqav2(coco, 'train2014', first_image=9)
    gqa(root / 'gqa', 'train')
    text_vqa(root / 'textvqa', 'test')
    vizwiz(root / 'vizwiz', 'test')
    return {
        'vqav2_val': vqav2(coco),
        'vqav2_test': vqav2(coco, 'test2015', first_image=1),
        'vqav2_testdev': vqav2(coco, 'test-dev2015', images=2, first_image=1),
        'ok_vqa_val2014': ok_vqa(coco),
        'gqa': gqa(root / 'gqa'),
        'gqa_val': gqa(root / 'gqa', 'val'),
        'nocaps_val': nocaps(root / 'nocaps'),
        'coco_karpathy_test': karpathy_coco['test'],
        'coco_karpathy_val': karpathy_coco['val'],
        'coco2014_cap_val': coco_captions(coco),
        'coco2017_cap_val': coco_captions(coco, 'val2017', first_image=397133),
        'flickr30k_test': karpathy_flickr['test'],
        'flickr30k_test_retrieval': karpathy_flickr['test'],
        'coco_karpathy_test_retrieval': karpathy_coco['test'],
        'textvqa_val': text_vqa(root / 'textvqa'),
        'vizwiz_vqa_val': vizwiz(root / 'vizwiz'),
        'scienceqa_img': science_qa(root / 'scienceqa'),
        'pope': pope(root / 'pope', coco),
    }
