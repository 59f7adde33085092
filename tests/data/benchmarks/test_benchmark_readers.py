"""Each reader gives back, item by item, what the generator of miniature data sets knows."""

import json
import pickle
from dataclasses import replace

import miniature_benchmarks as mini
import numpy as np
import pytest

from sparselora_jax.data.benchmarks import sniff
from sparselora_jax.data.benchmarks.catalog import BENCHMARKS
from sparselora_jax.data.benchmarks.discover import discover
from sparselora_jax.data.benchmarks.load import load, summary


def assert_same(items, expected):
    """The items equal the expected ones in order, including the pixels of their images."""
    assert len(items) == len(expected)
    for index, want in enumerate(expected):
        item = items[index]
        got = {name: getattr(item, name) for name in item.__slots__ if name != 'image'}
        assert got == {name: getattr(want, name) for name in got}
        assert type(item.id) is type(want.id)
        np.testing.assert_array_equal(item.image.read(), want.pixels)


def assert_loads(expected, name, root):
    """The benchmark equals what the generator has just written."""
    assert_same(load(name, root), expected)


@pytest.fixture(scope='module')
def all_benchmarks(tmp_path_factory):
    """(folder with all benchmarks in their published form, what they hold)."""
    root = tmp_path_factory.mktemp('all')
    return root, mini.everything(root)


@pytest.mark.parametrize('name', list(BENCHMARKS))
def test_a_published_benchmark_is_read_from_a_folder_of_all(name, all_benchmarks):
    root, expected = all_benchmarks
    items = load(name, root)
    assert_same(items, expected[name])
    count = BENCHMARKS.find(name).count
    assert any(f'{len(items)} items' in note and f'{count:,}' in note for note in items.notes)


def test_a_folder_is_summarised_by_benchmark(all_benchmarks):
    root, expected = all_benchmarks
    lines = summary(discover(root))
    assert len(lines) == len(expected)
    assert 'coco2014_cap_val: coco/annotations/captions_val2014.json' in lines
    pair = 'coco/v2_OpenEnded_mscoco_val2014_questions.json, coco/v2_mscoco_val2014_annotations.json'
    assert f'vqav2_val: {pair}' in lines
    rest = 'pope: pope/coco_pope_random.json, pope/coco_pope_popular.json and 1 more'
    assert rest in lines


@pytest.mark.slow
def test_names_of_files_do_not_matter(all_benchmarks, tmp_path):
    """Published files under other names and in other folders are known by their keys."""
    root, expected = all_benchmarks
    (tmp_path / 'images').symlink_to(root)
    for number, path in enumerate(sorted(root.rglob('*.json'))):
        mini.write(tmp_path / f'{number}' / 'file.json', path.read_bytes())
    discovery = discover(tmp_path)
    renamed = tuple(file for file in discovery.files if file.path.name == 'file.json')
    discovery = replace(discovery, files=renamed)
    # The categories of POPE, and the validation and training files of GQA, are told apart by names or full counts.
    for name in expected.keys() - {'pope', 'gqa_val'}:
        assert_same(load(name, discovery), expected[name])


def test_the_annotations_of_boxes_are_not_captions(tmp_path):
    expected = mini.coco_captions(tmp_path)
    (tmp_path / 'annotations' / 'captions_val2014.json').rename(tmp_path / 'annotations' / 'a.json')
    assert_same(load('coco2014_cap_val', tmp_path), expected)


@pytest.mark.slow
def test_keys_may_be_in_any_order(tmp_path):
    """Tools that rewrite JSON sort the keys, so that `images` comes behind all annotations, and `data_subtype` too."""
    expected = {'vqav2_val': mini.vqav2(tmp_path), 'coco2014_cap_val': mini.coco_captions(tmp_path)}
    expected['nocaps_val'] = mini.nocaps(tmp_path)
    for path in tmp_path.rglob('*.json'):
        path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True, indent=1))
    for name, want in expected.items():
        assert_same(load(name, tmp_path), want)


def test_nocaps_without_domains(tmp_path):
    assert_loads(mini.nocaps(tmp_path, has_domains=False), 'nocaps_val', tmp_path)


def test_text_vqa_without_words(tmp_path):
    assert_loads(mini.text_vqa(tmp_path, has_words=False), 'textvqa_val', tmp_path)


def test_science_qa_with_many_ids_in_the_file_of_splits(tmp_path, monkeypatch):
    """The keys that tell what the file holds are behind its head."""
    monkeypatch.setattr(sniff, 'HEAD', 1024)
    expected = mini.science_qa(tmp_path, unused_ids=300)
    (tmp_path / 'pid_splits.json').rename(tmp_path / 'a.json')
    assert (tmp_path / 'a.json').stat().st_size > 2048
    assert_loads(expected, 'scienceqa_img', tmp_path)
    assert 'scienceqa_img: problems.json, a.json' in summary(discover(tmp_path))


def test_science_qa_without_a_file_of_splits(tmp_path):
    assert_loads(mini.science_qa(tmp_path, has_splits=False), 'scienceqa_img', tmp_path)


def test_a_question_of_2015_is_none_of_ok_vqa(tmp_path):
    """VQA of 2015 has the keys of VQAv2, and ids like those of OK-VQA."""
    expected = mini.ok_vqa(tmp_path)
    questions = [{'image_id': 42, 'question': 'What is it?', 'question_id': 420}]
    answers = [{'answer': 'a cat', 'answer_confidence': 'yes', 'answer_id': 1}]
    annotation = {'image_id': 42, 'question_id': 420, 'answers': answers, 'multiple_choice_answer': 'a cat'}
    annotation |= {'question_type': 'what is', 'answer_type': 'other'}
    mini.write(tmp_path / '2015' / 'questions.json', mini.vqa_questions('val2014', questions))
    mini.write(tmp_path / '2015' / 'annotations.json', mini.vqa_annotations('val2014', [annotation]))
    assert_same(load('ok_vqa_val2014', tmp_path), expected)


class TestLavis:
    """Lists of LAVIS, without any published file."""

    @pytest.mark.parametrize(('name', 'subset'), [('vqav2_val', 'val2014'), ('vqav2_test', 'test2015')])
    def test_questions_of_vqav2(self, tmp_path, name, subset):
        items = mini.vqav2(tmp_path, subset)
        for path in tmp_path.glob('*.json'):
            path.unlink()
        expected = mini.lavis_questions(tmp_path / 'vqa_val_eval.json', items, subset)
        # A list with a part of the questions lies beside it.
        mini.lavis_questions(tmp_path / 'vqa_val.json', items[:3], subset)
        assert_same(load(name, tmp_path), expected)

    def test_questions_of_ok_vqa(self, tmp_path):
        items = mini.ok_vqa(tmp_path)
        for path in tmp_path.glob('*.json'):
            path.unlink()
        expected = mini.lavis_questions(tmp_path / 'okvqa' / 'vqa_val_eval.json', items)
        mini.lavis_questions(tmp_path / 'vqa' / 'vqa_val_eval.json', mini.vqav2(tmp_path / 'coco'))
        assert_same(load('ok_vqa_val2014', tmp_path), expected)

    def test_questions_of_gqa(self, tmp_path):
        items = mini.gqa(tmp_path)
        for path in tmp_path.glob('*.json'):
            path.unlink()
        expected = mini.lavis_gqa(tmp_path / 'testdev_balanced_questions.json', items)
        assert_same(load('gqa', tmp_path), expected)

    def test_captions(self, tmp_path):
        coco = mini.karpathy(tmp_path / 'unused.json', tmp_path, 'coco')
        flickr = mini.karpathy(tmp_path / 'unused.json', tmp_path, 'flickr30k')
        (tmp_path / 'unused.json').unlink()
        for split in ('val', 'test'):
            mini.lavis_captions(tmp_path / f'coco_karpathy_{split}.json', coco[split], 'val2014')
        mini.lavis_captions(tmp_path / 'flickr30k_test.json', flickr['test'], 'flickr30k-images')
        assert_same(load('coco_karpathy_test', tmp_path), coco['test'])
        assert_same(load('coco_karpathy_val', tmp_path), coco['val'])
        assert_same(load('flickr30k_test', tmp_path), flickr['test'])


class TestParquet:
    """Files of Hugging Face data sets, without any other file."""

    @pytest.fixture
    def source(self, tmp_path_factory):
        return tmp_path_factory.mktemp('source')

    @pytest.mark.parametrize(
        ('name', 'split', 'subset'),
        [
            ('vqav2_val', 'validation', 'val2014'),
            ('vqav2_test', 'test', 'test2015'),
            ('vqav2_testdev', 'testdev', 'test-dev2015'),
        ],
    )
    def test_vqav2(self, source, tmp_path, name, split, subset):
        expected = mini.parquet_vqav2(tmp_path, mini.vqav2(source, subset), split)
        other = 'validation' if split == 'test' else 'test'
        mini.parquet_vqav2(tmp_path, mini.vqav2(source, 'val2014', images=2, first_image=1), other)
        assert_same(load(name, tmp_path), expected)

    def test_ok_vqa(self, source, tmp_path):
        assert_loads(mini.parquet_ok_vqa(tmp_path, mini.ok_vqa(source)), 'ok_vqa_val2014', tmp_path)

    @pytest.mark.parametrize(('name', 'subset'), [('gqa', 'testdev'), ('gqa_val', 'val')])
    def test_gqa_joins_questions_with_images(self, source, tmp_path, name, subset):
        expected = mini.parquet_gqa(tmp_path, mini.gqa(source, subset), subset)
        other = 'val' if subset == 'testdev' else 'testdev'
        mini.parquet_gqa(tmp_path, mini.gqa(source, other), other)
        assert_same(load(name, tmp_path), expected)

    def test_gqa_with_a_folder_of_images(self, source, tmp_path):
        expected = mini.parquet_gqa(source / 'hf', mini.gqa(tmp_path))
        for path in tmp_path.glob('*.json'):
            path.unlink()
        (source / 'hf' / 'testdev_balanced_instructions').rename(tmp_path / 'testdev_balanced_instructions')
        assert_same(load('gqa', tmp_path), expected)

    def test_coco_of_both_years(self, source, tmp_path):
        expected = mini.parquet_coco(tmp_path / '2014', mini.coco_captions(source))
        expected_2017 = mini.coco_captions(source, 'val2017', first_image=397133)
        mini.parquet_coco(tmp_path / '2017', expected_2017, 'val2017')
        assert_same(load('coco2014_cap_val', tmp_path), expected)
        assert_same(load('coco2017_cap_val', tmp_path), expected_2017)

    def test_karpathy_names_images_in_folders(self, source, tmp_path):
        items = mini.karpathy(source / 'dataset_coco.json', tmp_path, 'coco')
        mini.parquet_karpathy(tmp_path / 'hf', items)
        assert_same(load('coco_karpathy_test', tmp_path), items['test'])
        assert_same(load('coco_karpathy_val', tmp_path), items['val'])

    def test_nocaps(self, source, tmp_path):
        assert_loads(mini.parquet_nocaps(tmp_path, mini.nocaps(source)), 'nocaps_val', tmp_path)

    def test_flickr30k_by_its_column_of_splits(self, source, tmp_path):
        items = mini.karpathy(source / 'dataset_flickr30k.json', source, 'flickr30k')
        assert_loads(mini.parquet_flickr30k(tmp_path, items), 'flickr30k_test', tmp_path)

    def test_text_vqa(self, source, tmp_path):
        assert_loads(mini.parquet_text_vqa(tmp_path, mini.text_vqa(source)), 'textvqa_val', tmp_path)

    def test_vizwiz(self, source, tmp_path):
        assert_loads(mini.parquet_vizwiz(tmp_path, mini.vizwiz(source)), 'vizwiz_vqa_val', tmp_path)

    def test_science_qa_leaves_out_questions_without_image(self, source, tmp_path):
        assert_loads(mini.parquet_science_qa(tmp_path, mini.science_qa(source)), 'scienceqa_img', tmp_path)

    def test_pope(self, source, tmp_path):
        assert_loads(mini.parquet_pope(tmp_path, mini.pope(source, source)), 'pope', tmp_path)

    def test_files_that_the_server_has_converted(self, source, tmp_path):
        expected = mini.parquet_vizwiz(source / 'hf', mini.vizwiz(source))
        (tmp_path / 'default' / 'val').mkdir(parents=True)
        for number, path in enumerate(sorted((source / 'hf' / 'data').iterdir())):
            path.rename(tmp_path / 'default' / 'val' / f'{number:04d}.parquet')
        assert_same(load('vizwiz_vqa_val', tmp_path), expected)

    def test_images_are_read_in_any_order(self, source, tmp_path):
        expected = mini.parquet_vqav2(tmp_path, mini.vqav2(source, images=6))
        items = load('vqav2_val', tmp_path)
        for index in np.random.default_rng(0).permutation(len(expected)):
            np.testing.assert_array_equal(items[index].image.read(), expected[index].pixels)


class TestUserData:
    """A user's own folder with a data.jsonl."""

    def test_lines_with_and_without_optional_fields(self, tmp_path):
        data = mini.image(1)
        mini.write(tmp_path / 'cats' / '1.jpg', data)
        lines = [
            {'image': 'cats/1.jpg', 'question': 'What colour?', 'references': ['teal', 'blue'], 'metric': 'vqa'},
            {'image': './cats/1.jpg', 'prompt': 'Asleep?', 'answer': 'yes', 'id': 'q2', 'groups': {'kind': 'yes/no'}},
            {'image': 'cats/1.jpg', 'answers': ['a cat'], 'choices': ['a cat', 'a dog'], 'context': 'Look.'},
            {'image': 'cats/1.jpg', 'question': 'Not for evaluation', 'split': 'train'},
            {'image': 'cats/1.jpg', 'question': 'Unknown?', 'split': 'test'},
        ]
        mini.write(tmp_path / 'data.jsonl', lines)
        image = 'cats/1.jpg'
        expected = [
            mini.Expected(1, image, data, 'What colour?', ('teal', 'blue')),
            mini.Expected('q2', image, data, 'Asleep?', ('yes',), groups={'kind': 'yes/no'}),
            mini.Expected(3, image, data, None, ('a cat',), ('a cat', 'a dog'), 'Look.'),
            mini.Expected(5, image, data, 'Unknown?'),
        ]
        for path in (tmp_path, tmp_path / 'data.jsonl'):
            items = load(str(path), tmp_path)
            assert_same(items, expected)
            assert items.metric == 'vqa'
            assert items.notes == ()


def test_items_survive_a_change_of_process(all_benchmarks):
    """Workers that load data get the items by pickle."""
    root, expected = all_benchmarks
    items = pickle.loads(pickle.dumps(load('vqav2_val', root)))
    assert_same(items, expected['vqav2_val'])


def test_some_of_the_items(all_benchmarks):
    root, expected = all_benchmarks
    want = expected['vqav2_val']
    items = load('vqav2_val', root)
    assert_same(items.take([3, 0]), [want[3], want[0]])
    assert_same(items.take(np.array([3, 0])).take([1]), [want[0]])
    assert items[-1] == items[len(items) - 1]
    with pytest.raises(IndexError):
        items[len(items)]
    assert len(list(items)) == len(items)
