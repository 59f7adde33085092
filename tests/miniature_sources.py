"""Writes small data sets to restore with in the layout of each publication, and says what a reader must return.

Names of files, keys and types are those of the publications; counts are scaled down.
"""

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import miniature_benchmarks as benchmarks
import numpy as np
import tensorflow_datasets as tfds
from miniature_benchmarks import captions_of, image, write
from PIL import Image


@dataclass(frozen=True)
class Expected:
    """What a reader must return for one record."""

    image: bytes | None  # the image file; None for a text
    answer: str
    question: str | None = None

    @property
    def pixels(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.image)).convert('RGB'))


Layout = tuple[str, list[Expected]]  # (name of the source, its records in order)


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def caption_of(seed: int) -> str:
    return f"a river has burst it 's banks {seed} , \u00e9t\u00e9"


def tar_shards(root: Path, counts: tuple[int, ...] = (5, 4)) -> Layout:
    """Write shards of img2dataset, with the tables and statistics that lie beside them."""
    expected = []
    for shard, count in enumerate(counts):
        root.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / f'{shard:05d}.tar', 'w') as archive:
            for place in range(count):
                key = f'{shard:05d}{place:04d}'
                data = image(100 * shard + place)
                caption = caption_of(100 * shard + place)
                fields = {'caption': caption, 'url': f'http://a.b/{key}', 'key': key, 'status': 'success'}
                add_member(archive, f'{key}.jpg', data)
                add_member(archive, f'{key}.txt', caption.encode())
                add_member(archive, f'{key}.json', json.dumps(fields).encode())
                expected.append(Expected(data, caption))
        write(root / f'{shard:05d}_stats.json', {'count': count, 'successes': count, 'start_time': 1.5})
        benchmarks.pq.write_table(
            benchmarks.pa.table({'url': ['http://a.b/1'], 'caption': ['a'], 'key': ['0'], 'status': ['success']}),
            root / f'{shard:05d}.parquet',
        )
    return str(root), expected


def image_text_files(root: Path) -> Layout:
    """Write img2dataset's output format `files`."""
    expected = []
    for shard in range(2):
        for place in range(3):
            data = image(10 * shard + place, '.png')
            path = root / f'{shard:05d}' / f'{shard:05d}{place:04d}.png'
            write(path, data)
            # Further lines are translations in some collections.
            write(path.with_suffix('.txt'), f'{caption_of(place)}\nfr=une rivi\u00e8re\n'.encode())
            expected.append(Expected(data, caption_of(place)))
    return str(root), expected


def table_of_addresses(root: Path, name: Callable[[int, str], str] | None = None) -> Layout:
    """Write CC3M's table, with images as LAVIS downloads them."""
    expected = []
    lines = []
    for row in range(4):
        url = f'http://images.example/{row}.jpg?a=b'
        data = image(row)
        stem = f'{row}_{zlib.crc32(url.encode())}' if name is None else name(row, url)
        write(root / 'training' / f'{stem}.jpg', data)
        lines.append(f'{caption_of(row)}\t{url}\n')
        expected.append(Expected(data, caption_of(row)))
    write(root / 'Train_GCC-training.tsv', ''.join(lines).encode())
    return str(root), expected


def table_with_llava_names(root: Path) -> Layout:
    return table_of_addresses(root, lambda row, url: f'GCC_train_{row:09d}')


def table_with_head(root: Path) -> Layout:
    """Write a report of a download, compressed."""
    expected = []
    lines = ['caption\tpath\tdataset\tmimetype\tsize\tstatus\turl\n']
    for row in range(3):
        write(root / 'training' / f'{row}_55.jpg', image(row))
        lines.append(f'{caption_of(row)}\ttraining/{row}_55.jpg\tcc3m\timage/jpeg\t100\t200\thttp://a/{row}\n')
        expected.append(Expected(image(row), caption_of(row)))
    write(root / 'downloaded_cc3m_report.tsv.gz', gzip.compress(''.join(lines).encode()))
    return str(root), expected


def flickr_token(root: Path) -> Layout:
    expected = []
    lines = []
    for number in range(2):
        write(root / 'flickr30k-images' / f'{1000092795 + number}.jpg', image(number))
        for place, caption in enumerate(captions_of(number)):
            lines.append(f'{1000092795 + number}.jpg#{place}\t{caption}\n')
            expected.append(Expected(image(number), caption))
    write(root / 'results_20130124.token', ''.join(lines).encode())
    return str(root), expected


def _each_caption(items: list[benchmarks.Expected]) -> list[Expected]:
    return [Expected(item.image, caption) for item in items for caption in item.references]


def coco_train(root: Path) -> Layout:
    """Write both captions files of COCO 2014, with the files of boxes beside them."""
    training = benchmarks.coco_captions(root, 'train2014', first_image=9)
    benchmarks.coco_captions(root, 'val2014')
    return str(root), _each_caption(training)


def coco_annotations(root: Path) -> Layout:
    """Write the same, and name the file, whose images lie beside its folder."""
    name, expected = coco_train(root)
    return f'{name}/annotations/captions_train2014.json', expected


def karpathy_coco(root: Path) -> Layout:
    items = benchmarks.karpathy(
        root / 'dataset_coco.json', root / 'coco', 'coco', ('test', 'restval', 'train', 'val', 'train')
    )
    return str(root), _each_caption([*items['train'], *items['restval']])


def karpathy_flickr(root: Path) -> Layout:
    items = benchmarks.karpathy(root / 'dataset_flickr30k.json', root, 'flickr30k', ('test', 'train', 'train'))
    return str(root), _each_caption(items['train'])


def lavis_coco(root: Path) -> Layout:
    """Write LAVIS's list for training, and name the images, which lie elsewhere."""
    rows = []
    expected = []
    for number in range(3):
        name = benchmarks.coco_file(500 + number, 'train2014')
        write(root / 'images' / 'train2014' / name, image(number))
        for caption in captions_of(number, 2):
            rows.append({'caption': caption, 'image': f'train2014/{name}', 'image_id': f'coco_{500 + number}'})
            expected.append(Expected(image(number), caption))
    path = write(root / 'lavis' / 'annotations' / 'coco_karpathy_train.json', rows)
    return f'{path}::{root / "images"}', expected


def lavis_vg(root: Path) -> Layout:
    """Write the regions of Visual Genome as LAVIS's list."""
    rows = []
    expected = []
    for number in range(4):
        folder = ('VG_100K', 'VG_100K_2')[number % 2]
        write(root / folder / f'{number + 2}.jpg', image(number))
        rows.append({'image': f'{folder}/{number + 2}.jpg', 'caption': f'the dog is {number}'})
        expected.append(Expected(image(number), f'the dog is {number}'))
    write(root / 'annotations' / 'vg_caption.json', rows)
    return str(root), expected


def vg_regions(root: Path) -> Layout:
    rows = []
    expected = []
    for number in range(3):
        write(root / ('VG_100K', 'VG_100K_2')[number % 2] / f'{number + 1}.jpg', image(number))
        regions = [
            {'region_id': 10 * number + place, 'width': 82, 'height': 139, 'image_id': number + 1, 'phrase': caption}
            | {'y': 57, 'x': 421}
            for place, caption in enumerate(captions_of(number, 2))
        ]
        rows.append({'regions': regions, 'id': number + 1})
        expected += [Expected(image(number), region['phrase']) for region in regions]
    write(root / 'region_descriptions.json', rows)
    return str(root), expected


def conversation(*turns: str) -> list[dict]:
    return [{'from': ('human', 'gpt')[place % 2], 'value': value} for place, value in enumerate(turns)]


def llava_pretrain(root: Path) -> Layout:
    rows = []
    expected = []
    for number in range(3):
        name = f'{number:05d}/{number:05d}4539375.jpg'
        write(root / name, image(number))
        turns = conversation('Render a clear summary of the photo.\n<image>', caption_of(number))
        rows.append({'id': f'{number:05d}4539375', 'image': name, 'conversations': turns})
        expected.append(Expected(image(number), caption_of(number), 'Render a clear summary of the photo.'))
    write(root / 'blip_laion_cc_sbu_558k.json', rows)
    return str(root), expected


def llava_instruct(root: Path) -> Layout:
    """Write LLaVA's instructions about images of COCO 2017, several rows about one image."""
    name = '000000033471.jpg'
    write(root / 'coco' / 'train2017' / name, image(1))
    turns = ('<image>\nWhat colour is it?', 'It is red.', 'Is it fast?', 'No.')
    rows = [
        {'id': '000000033471', 'image': name, 'conversations': conversation(*turns)},
        {'id': '000000033471', 'image': name, 'conversations': conversation('Where?\n<image>', 'In a city.')},
    ]
    path = write(root / 'llava_instruct_150k.json', rows)
    pairs = [('What colour is it?', 'It is red.'), ('Is it fast?', 'No.'), ('Where?', 'In a city.')]
    return str(path), [Expected(image(1), answer, question) for question, answer in pairs]


def llava_mix(root: Path) -> Layout:
    """Write the mixture of LLaVA-1.5: images of several data sets, whose names are alike, and rows without image."""
    rows = []
    expected = []
    for number, folder in enumerate(('gqa/images', 'vg/VG_100K')):
        write(root / folder / '2407890.jpg', image(number))
        turns = conversation('<image>\nIs it here?', f'answer {number}')
        rows.append({'id': '2407890', 'image': f'{folder}/2407890.jpg', 'conversations': turns})
        expected.append(Expected(image(number), f'answer {number}', 'Is it here?'))
    rows.insert(1, {'id': 'wgByO4Y_0', 'model': '', 'conversations': conversation('How are you?', 'Well.')})
    expected.insert(1, Expected(None, 'Well.', 'How are you?'))
    # Some conversations begin with an answer.
    rows.append({'id': 'x', 'conversations': [{'from': 'gpt', 'value': 'Hello'}, *conversation('Bye', 'Bye.')]})
    expected.append(Expected(None, 'Bye.', 'Bye'))
    write(root / 'llava_v1_5_mix665k.json', rows)
    return str(root), expected


def text_file(root: Path) -> Layout:
    """Write a text with two paragraphs."""
    path = write(root / 'speech.txt', b'Fellow-citizens of\nthe Senate:\n\n \nIt is well.\r\n\r\nA\n')
    return str(path), [Expected(None, 'Fellow-citizens of the Senate:'), Expected(None, 'It is well.')]


def text_folder(root: Path) -> Layout:
    write(root / 'b' / '1.txt', b'The second text.')
    write(root / 'a.txt', '\ufeffThe first text.'.encode())
    return str(root), [Expected(None, 'The first text.'), Expected(None, 'The second text.')]


def user_folder(root: Path) -> Layout:
    lines = []
    expected = []
    for number in range(3):
        write(root / f'{number}.png', image(number, '.png'))
        lines.append({'image': f'{number}.png', 'prompt': 'what is it?', 'answer': f'a cat {number}'})
        expected.append(Expected(image(number, '.png'), f'a cat {number}', 'what is it?'))
    write(root / 'data.jsonl', lines)
    return str(root), expected


def parquet_cc3m(root: Path) -> Layout:
    """Write shards of pairs as Hugging Face does, whose images have no names, with a split that is not for training."""
    expected = [Expected(image(number), caption_of(number)) for number in range(7)]
    rows = [{'image': {'bytes': want.image, 'path': None}, 'caption': want.answer} for want in expected]
    benchmarks.table(root / 'data', 'train', rows, shards=3)
    benchmarks.table(root / 'data', 'validation', rows[:2], shards=1)
    # The card of a data set is a JSON file of others.
    write(root / 'dataset_infos.json', {'default': {'features': {}}})
    return str(root), expected


def parquet_coco(root: Path) -> Layout:
    """Write COCO's captions with one row for each, so that several rows have the image."""
    rows = []
    expected = []
    for number in range(3):
        for caption in captions_of(number, 2):
            picture = {'bytes': image(number), 'path': f'COCO_train2014_{number:012d}.jpg'}
            rows.append({'cocoid': number, 'image': picture, 'sentences': {'raw': caption, 'sentid': 1}})
            expected.append(Expected(image(number), caption))
    benchmarks.table(root, 'train', rows)
    return str(root), expected


def parquet_flickr(root: Path) -> Layout:
    """Write Flickr30k as on Hugging Face: one split 'test', whose column has the split, and all captions in a row."""
    rows = []
    expected = []
    for number, split in enumerate(('test', 'train', 'val', 'train')):
        captions = captions_of(number)
        picture = {'bytes': image(number), 'path': None}
        rows.append({'image': picture, 'caption': captions, 'split': split, 'filename': f'{number}.jpg'})
        if split == 'train':
            expected += [Expected(image(number), caption) for caption in captions]
    benchmarks.table(root / 'data', 'test', rows)
    return str(root), expected


def parquet_conversations(root: Path) -> Layout:
    """Write LLaVA's conversations as one file; a row has no image."""
    rows = [
        {
            'id': str(number),
            'image': None if number == 1 else {'bytes': image(number), 'path': 'image.jpg'},
            'conversations': conversation('<image>\nWhat?', f'A cat {number}.', 'Where?', 'Here.'),
        }
        for number in range(3)
    ]
    (path,) = benchmarks.table(root, 'train', rows, shards=1)
    expected = []
    for number in range(3):
        file = None if number == 1 else image(number)
        expected += [Expected(file, f'A cat {number}.', 'What?'), Expected(file, 'Here.', 'Where?')]
    return str(path.rename(root / 'chat.parquet')), expected


def parquet_questions(root: Path) -> Layout:
    """Write questions with ten answers, of which the one that most people gave is learned."""
    rows = []
    for number in range(3):
        answers = [{'answer': answer, 'answer_id': place} for place, answer in enumerate(['no', 'yes', 'yes'])]
        picture = {'bytes': image(number), 'path': None}
        rows.append({'image': picture, 'image_id': number, 'question': f'is it {number}?', 'answers': answers})
    for path in benchmarks.table(root, 'train', rows):
        # Users give files other names; together they are one data set.
        path.rename(root / f'part_{path.name[6:11]}.parquet')
    return str(root), [Expected(image(number), 'yes', f'is it {number}?') for number in range(3)]


class _Prepared(tfds.core.GeneratorBasedBuilder):
    """A builder whose records the tests give; like that of easy-VQA, it needs no TensorFlow."""

    VERSION = tfds.core.Version('1.1.0')
    features: dict
    records: dict[str, list[dict]]

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(self.features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {split: iter(enumerate(records)) for split, records in self.records.items()}

    def _generate_examples(self):
        raise NotImplementedError


def _prepare(root: Path, name: str, features: dict, records: dict[str, list[dict]]) -> str:
    # Not registered, so that another test may write a data set of this name.
    with tfds.core.registered.skip_registration():
        kind = type(name, (_Prepared,), {'features': features, 'records': records, '__module__': __name__})
    tfds.disable_progress_bar()
    builder = kind(data_dir=str(root), file_format='array_record')
    builder.download_and_prepare()
    return str(root)


def tfds_captions(root: Path) -> Layout:
    """Write records with the fields of `coco_captions`, one caption an image."""
    features = {
        'image': tfds.features.Image(encoding_format='jpeg'),
        'image/filename': tfds.features.Text(),
        'image/id': np.int64,
        'captions': tfds.features.Sequence({'text': tfds.features.Text(), 'id': np.int64}),
    }
    records = {}
    expected = []
    for split, first in (('train', 0), ('restval', 10), ('val', 20)):
        records[split] = [
            {
                'image': image(first + place),
                'image/filename': f'{place}.jpg',
                'image/id': place,
                'captions': [{'text': caption_of(first + place), 'id': place}],
            }
            for place in range(3)
        ]
        if split != 'val':
            expected += [Expected(image(first + place), caption_of(first + place)) for place in range(3)]
    return _prepare(root, 'CocoLike', features, records), expected


def tfds_questions(root: Path) -> Layout:
    """Write records with the fields of big_vision's builder of VQAv2."""
    features = {
        'image': tfds.features.Image(encoding_format='jpeg'),
        'image/id': np.int32,
        'question_id': np.int32,
        'question_text': tfds.features.Text(),
        'answers': tfds.features.Sequence(tfds.features.Text()),
        'top_answer': tfds.features.Text(),
    }
    rows = [
        {
            'image': image(place),
            'image/id': place,
            'question_id': place,
            'question_text': f'is it {place}?',
            'answers': ['no', 'yes'],
            'top_answer': f'yes {place}',
        }
        for place in range(3)
    ]
    expected = [Expected(image(place), f'yes {place}', f'is it {place}?') for place in range(3)]
    return _prepare(root, 'VqaLike', features, {'train': rows}), expected


# A layout by its name: a function that writes it.
LAYOUTS: dict[str, Callable[[Path], Layout]] = {
    function.__name__: function
    for function in (
        tar_shards,
        image_text_files,
        table_of_addresses,
        table_with_llava_names,
        table_with_head,
        flickr_token,
        coco_train,
        coco_annotations,
        karpathy_coco,
        karpathy_flickr,
        lavis_coco,
        lavis_vg,
        vg_regions,
        llava_pretrain,
        llava_instruct,
        llava_mix,
        text_file,
        text_folder,
        user_folder,
        parquet_cc3m,
        parquet_coco,
        parquet_flickr,
        parquet_conversations,
        parquet_questions,
        tfds_captions,
        tfds_questions,
    )
}
