"""Bad files and images of benchmarks: one line that names the file and the place, and never another error."""

import json
import os
import random
import re

import miniature_benchmarks as mini
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz import alter, alter_json
from PIL import Image

from sparselora_jax.data.benchmarks.catalog import Benchmark
from sparselora_jax.data.benchmarks.discover import discover
from sparselora_jax.data.benchmarks.gqa import GqaQuestions
from sparselora_jax.data.benchmarks.load import load, summary
from sparselora_jax.runtime.errors import DataError

QUESTIONS = 'v2_OpenEnded_mscoco_val2014_questions.json'
ANNOTATIONS = 'v2_mscoco_val2014_annotations.json'


def assert_refused(pattern, name, root, **options):
    """The benchmark is refused with one line that matches."""
    with pytest.raises(DataError, match=pattern) as error:
        load(name, root, **options)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 600


def edit(path, change):
    """Change a JSON file: `change` edits the decoded value."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def vqav2(tmp_path):
    """A folder with the validation split of VQAv2."""
    mini.vqav2(tmp_path)
    return tmp_path


class TestJson:
    @pytest.mark.parametrize('name', [QUESTIONS, ANNOTATIONS])
    @pytest.mark.parametrize('share', [0.5, 0.9, 0.999])
    def test_a_truncated_file(self, vqav2, name, share):
        text = (vqav2 / name).read_bytes()
        (vqav2 / name).write_bytes(text[: int(share * len(text))])
        place = 'cut off: it ends at byte|broken JSON at byte [0-9,]+: Unterminated string'
        assert_refused(rf'{name}: .*({place})', 'vqav2_val', vqav2)

    @pytest.mark.parametrize('filler', ['e', '\u00e9', '\u6c34', '\U0001f600'])
    def test_broken_json_names_the_byte(self, vqav2, filler):
        """The byte is that at which Python's decoder fails, which counts characters."""
        value = json.loads((vqav2 / QUESTIONS).read_text())
        value['questions'][0]['question'] = 300 * filler
        text = json.dumps(value, ensure_ascii=False)
        at = text.index('"image_id"', len(text) * 2 // 3)
        text = f'{text[:at]}%{text[at:]}'
        (vqav2 / QUESTIONS).write_text(text, encoding='utf-8')
        with pytest.raises(json.JSONDecodeError) as oracle:
            json.loads(text)
        byte = len(text[: oracle.value.pos].encode())
        assert_refused(f'{QUESTIONS}: broken JSON at byte {byte:,}: ', 'vqav2_val', vqav2)

    @pytest.mark.parametrize(
        ('tail', 'reason'),
        [(b' x', 'text after the end'), (b'\0', 'text after the end'), (b'\xff', 'not UTF-8 at byte')],
    )
    def test_text_behind_the_end(self, vqav2, tail, reason):
        text = (vqav2 / ANNOTATIONS).read_bytes()
        (vqav2 / ANNOTATIONS).write_bytes(text + tail)
        assert_refused(reason, 'vqav2_val', vqav2)

    def test_bytes_that_are_not_utf_8(self, vqav2):
        text = (vqav2 / QUESTIONS).read_bytes()
        at = text.index(b'picture 3')
        (vqav2 / QUESTIONS).write_bytes(text[:at] + b'\xe9' + text[at:])
        assert_refused(f'{QUESTIONS}: not UTF-8 at byte {at:,}', 'vqav2_val', vqav2)

    @pytest.mark.parametrize('where', ['head', 'end'])
    def test_deep_nesting(self, vqav2, where):
        text = (vqav2 / QUESTIONS).read_text()
        deep = '{"a":' + 10**5 * '[' + 10**5 * ']' + '}, '
        at = text.index('{"image_id"') if where == 'head' else text.rindex('{"image_id"')
        (vqav2 / QUESTIONS).write_text(text[:at] + deep + text[at:])
        assert_refused(f'{QUESTIONS}: broken JSON at byte [0-9,]+: brackets are nested too deeply', 'vqav2_val', vqav2)

    @pytest.mark.parametrize(
        ('number', 'reason'),
        [
            ('9' * 5000, 'a number has too many digits'),
            (str(2**63), r'question_id is an integer of 64 bits, which does not fit'),
            ('1e400', 'question_id is inf, not an integer'),
            ('NaN', 'question_id is nan, not an integer'),
            ('1.5', 'question_id is 1.5, not an integer'),
            ('true', 'question_id is True, not an integer'),
            ('"7"', "question_id is '7', not an integer"),
            ('null', 'question_id is None, not an integer'),
        ],
    )
    def test_ids_that_are_none(self, vqav2, number, reason):
        text = (vqav2 / QUESTIONS).read_text()
        at = text.rindex('"question_id": ') + len('"question_id": ')
        (vqav2 / QUESTIONS).write_text(f'{text[:at]}{number}}}]}}')
        assert_refused(reason, 'vqav2_val', vqav2)

    def test_an_id_of_an_image_that_coco_does_not_have(self, vqav2):
        edit(vqav2 / QUESTIONS, lambda value: value['questions'][2].update(image_id=10**12))
        assert_refused(r'questions\[2\]: image_id is 1000000000000; ids of COCO have', 'vqav2_val', vqav2)

    @pytest.mark.parametrize(
        ('record', 'reason'),
        [
            ([], r'questions\[1\]: \[\] is not an object'),
            ({}, r"questions\[1\]: no field 'question_id'"),
            ({'question_id': 5, 'image_id': 262148, 'question': ['a']}, r"question is \['a'\], not a text"),
            ({'question_id': 5, 'image_id': 262148, 'question': '\ud800'}, 'half of a surrogate pair'),
        ],
    )
    def test_records_of_another_form(self, vqav2, record, reason):
        edit(vqav2 / QUESTIONS, lambda value: value['questions'].insert(1, record))
        assert_refused(reason, 'vqav2_val', vqav2)

    @pytest.mark.parametrize(
        ('answers', 'reason'),
        [
            (None, 'answers is None, not a list'),
            (['yes'], "'yes' is not an object"),
            ([{'raw': 'yes'}], "no field 'answer', only 'raw'"),
            ([{'answer': 'a'}, {'answer': 5}], 'answers holds 5, which is not a text'),
            ([{'answer': 'a\udc80'}], 'half of a surrogate pair'),
        ],
    )
    def test_answers_of_another_form(self, vqav2, answers, reason):
        edit(vqav2 / ANNOTATIONS, lambda value: value['annotations'][1].update(answers=answers))
        assert_refused(reason, 'vqav2_val', vqav2)

    def test_no_questions_at_all(self, vqav2):
        edit(vqav2 / QUESTIONS, lambda value: value.update(questions=[]))
        assert_refused('vqav2_val: no files of VQAv2, validation', 'vqav2_val', vqav2)

    def test_a_byte_order_mark_is_no_problem(self, vqav2):
        (vqav2 / QUESTIONS).write_bytes(b'\xef\xbb\xbf' + (vqav2 / QUESTIONS).read_bytes())
        assert len(load('vqav2_val', vqav2)) > 0


class TestPairs:
    """Files of questions and annotations that do not belong together."""

    def test_annotations_of_another_split(self, vqav2):
        other = vqav2 / 'other'
        mini.vqav2(other, 'train2014', first_image=9)
        (vqav2 / ANNOTATIONS).unlink()
        # As if the file had the wrong name and the wrong `data_subtype` too.
        text = (other / 'v2_mscoco_train2014_annotations.json').read_text().replace('train2014', 'val2014')
        (vqav2 / ANNOTATIONS).write_text(text)
        (other / 'v2_OpenEnded_mscoco_train2014_questions.json').unlink()
        pattern = 'do not belong together: 7 of 7 questions have no annotation, such as 262148000; 7 annotations have'
        assert_refused(pattern, 'vqav2_val', vqav2)

    def test_an_annotation_is_missing(self, vqav2):
        edit(vqav2 / ANNOTATIONS, lambda value: value['annotations'].pop(3))
        assert_refused('do not belong together: 1 of 7 questions have no annotation', 'vqav2_val', vqav2)

    def test_a_question_is_missing(self, vqav2):
        edit(vqav2 / QUESTIONS, lambda value: value['questions'].pop(3))
        assert_refused('do not belong together: 1 annotations have no question', 'vqav2_val', vqav2)

    def test_an_annotation_is_about_another_image(self, vqav2):
        edit(vqav2 / ANNOTATIONS, lambda value: value['annotations'][3].update(image_id=7))
        assert_refused('do not belong together: 1 questions have other images', 'vqav2_val', vqav2)

    def test_only_questions(self, vqav2):
        (vqav2 / ANNOTATIONS).unlink()
        assert_refused(f'no files of VQAv2, validation under .*: put {QUESTIONS} and', 'vqav2_val', vqav2)

    def test_two_different_files_of_annotations(self, vqav2):
        (vqav2 / 'copy').mkdir()
        (vqav2 / 'copy' / ANNOTATIONS).write_bytes((vqav2 / ANNOTATIONS).read_bytes())
        assert len(load('vqav2_val', vqav2)) == 7  # a copy is no problem
        edit(vqav2 / 'copy' / ANNOTATIONS, lambda value: value['annotations'].pop())
        assert_refused('annotations of vqav2, val2014: 2 files could be meant: ', 'vqav2_val', vqav2)

    @pytest.mark.parametrize(('name', 'key'), [(QUESTIONS, 'questions'), (ANNOTATIONS, 'annotations')])
    def test_duplicates(self, vqav2, name, key):
        edit(vqav2 / name, lambda value: value[key].append(value[key][0]))
        assert_refused(rf'{key}\[7\]: .*262148000.* (twice|a second annotation)', 'vqav2_val', vqav2)

    def test_captions_of_images_that_are_not_in_the_file(self, tmp_path):
        mini.coco_captions(tmp_path)
        edit(tmp_path / 'annotations' / 'captions_val2014.json', lambda value: value['images'].pop())
        assert_refused('captions of 1 images that are not in the file, such as', 'coco2014_cap_val', tmp_path)

    def test_an_image_occurs_twice(self, tmp_path):
        mini.nocaps(tmp_path)
        edit(tmp_path / 'nocaps_val_4500_captions.json', lambda value: value['images'].append(value['images'][0]))
        assert_refused(r'images\[3\]: the id 0 occurs twice', 'nocaps_val', tmp_path)

    def test_splits_of_other_problems(self, tmp_path):
        mini.science_qa(tmp_path)
        edit(tmp_path / 'pid_splits.json', lambda value: value['test'].append('999'))
        assert_refused(
            "do not belong together: 1 ids of 'test' are no problems, such as 999", 'scienceqa_img', tmp_path
        )

    def test_a_split_that_a_file_of_karpathy_does_not_have(self, tmp_path):
        mini.karpathy(tmp_path / 'dataset_coco.json', tmp_path, 'coco', ('train', 'restval'))
        assert_refused("no image of the split 'test', only of train, restval", 'coco_karpathy_test', tmp_path)


class TestTestSplits:
    """Splits without answers: their references are empty, and that is no error."""

    @pytest.mark.parametrize(
        ('name', 'write'),
        [
            ('vqav2_test', lambda root: mini.vqav2(root, 'test2015')),
            ('vqav2_testdev', lambda root: mini.vqav2(root, 'test-dev2015')),
            ('gqa', lambda root: mini.gqa(root, has_answers=False)),
        ],
    )
    def test_no_answers(self, tmp_path, name, write):
        write(tmp_path)
        items = load(name, tmp_path)
        assert len(items) > 0
        assert all(item.references == () for item in items)


class TestImages:
    def missing(self, vqav2, count):
        for path in sorted((vqav2 / 'val2014').iterdir())[:count]:
            path.unlink()

    def test_missing_images_are_counted_and_named(self, vqav2):
        self.missing(vqav2, 4)
        names = ', '.join(f'val2014/COCO_val2014_{262148 + 17 * number:012d}.jpg' for number in range(3))
        assert_refused(f'vqav2_val: 4 of 4 images are missing under .*, such as {names}; put', 'vqav2_val', vqav2)

    def test_missing_images_within_the_tolerance_are_left_out(self, vqav2):
        whole = load('vqav2_val', vqav2)
        self.missing(vqav2, 2)
        assert_refused(r'or leave out 3 of 7 items by tolerance=0\.5', 'vqav2_val', vqav2)
        assert_refused('2 of 4 images are missing', 'vqav2_val', vqav2, tolerance=0.49)
        items = load('vqav2_val', vqav2, tolerance=0.5)
        assert list(items) == list(whole)[3:]
        assert any('2 of 4 images are missing' in note and '3 of 7 items' in note for note in items.notes)
        self.missing(vqav2, 2)
        assert_refused('no item is left', 'vqav2_val', vqav2, tolerance=1.0)

    def test_items_without_images_can_be_scored(self, vqav2):
        whole = load('vqav2_val', vqav2)
        self.missing(vqav2, 4)
        items = load('vqav2_val', vqav2, needs_images=False)
        assert [item.references for item in items] == [item.references for item in whole]
        with pytest.raises(DataError, match=r'image val2014/COCO_val2014_000000262148.jpg is missing'):
            items[0].image.read()

    @pytest.mark.parametrize('kind', ['text', 'empty', 'truncated', 'folder', 'pipe', 'huge'])
    def test_an_image_that_cannot_be_read(self, vqav2, kind):
        path = vqav2 / 'val2014' / mini.coco_file(262148)
        data = path.read_bytes()
        path.unlink()
        if kind == 'text':
            path.write_text('<html>404</html>')
        elif kind == 'empty':
            path.touch()
        elif kind == 'truncated':
            path.write_bytes(data[: len(data) // 2])
        elif kind == 'folder':
            path.mkdir()
        elif kind == 'pipe':
            os.mkfifo(path)
        else:
            Image.new('1', (2**13, 2**13 + 1)).save(path, 'PNG')
        with pytest.raises(DataError, match=f'{path.name}: not a readable image') as error:
            load('vqav2_val', vqav2)[0].image.read()
        assert len(str(error.value).splitlines()) == 1

    @pytest.mark.parametrize('name', ['../secret.jpg', '/etc/passwd', 'a/../../secret.jpg', '', '.', 'a\0.jpg'])
    def test_a_path_that_leads_out_of_the_folder(self, tmp_path, name):
        mini.write(tmp_path / 'secret.jpg', mini.image(1))
        mini.write(tmp_path / 'data' / 'a' / 'b.jpg', mini.image(2))
        mini.write(tmp_path / 'data' / 'data.jsonl', [{'image': name, 'question': 'What?', 'answer': 'it'}])
        assert_refused('is not the name of an image|images are missing', str(tmp_path / 'data'), tmp_path)


class TestParquet:
    @pytest.fixture
    def vizwiz(self, tmp_path, tmp_path_factory):
        """A folder with two shards of VizWiz."""
        mini.parquet_vizwiz(tmp_path, mini.vizwiz(tmp_path_factory.mktemp('source'), count=6))
        return tmp_path

    def shard(self, folder, number=0):
        return folder / 'data' / f'val-{number:05d}-of-00002.parquet'

    def test_other_columns_are_named(self, vizwiz):
        for number in (0, 1):
            table = pq.read_table(self.shard(vizwiz, number)).drop_columns('category')
            pq.write_table(table, self.shard(vizwiz, number))
        columns = 'other columns than those of any known data set: answers, image, question, question_id'
        assert_refused(f'{self.shard(vizwiz).name}: a parquet with {columns}', 'vizwiz_vqa_val', vizwiz)

    def test_a_shard_with_other_columns(self, vizwiz):
        table = pq.read_table(self.shard(vizwiz, 1)).rename_columns(['id', 'image', 'question', 'answers', 'category'])
        pq.write_table(table, self.shard(vizwiz, 1))
        # It belongs to no set, so the set lacks a shard.
        assert_refused('val: 1 of 2 files are missing, such as number 1', 'vizwiz_vqa_val', vizwiz)

    def test_a_missing_shard(self, vizwiz):
        self.shard(vizwiz, 0).unlink()
        assert_refused('val: 1 of 2 files are missing, such as number 0', 'vizwiz_vqa_val', vizwiz)

    def test_a_truncated_file(self, vizwiz):
        path = self.shard(vizwiz, 1)
        path.write_bytes(path.read_bytes()[:-100])
        assert_refused('val: 1 of 2 files are missing, such as number 1', 'vizwiz_vqa_val', vizwiz)
        self.shard(vizwiz, 0).write_bytes(b'PAR1')
        assert_refused('00000-of-00002.parquet: not a parquet file, or damaged', 'vizwiz_vqa_val', vizwiz)
        assert any('00001-of-00002.parquet: not a parquet' in line for line in summary(discover(vizwiz)))

    def test_a_row_without_text(self, vizwiz):
        table = pq.read_table(self.shard(vizwiz)).to_pylist()
        table[1]['answers'] = ['a', None]
        schema = pq.read_schema(self.shard(vizwiz))
        pq.write_table(pa.Table.from_pylist(table, schema), self.shard(vizwiz))
        assert_refused(
            '00000-of-00002.parquet, row 1: answers holds None, which is not a text', 'vizwiz_vqa_val', vizwiz
        )

    @pytest.mark.parametrize('kind', ['path only', 'damaged'])
    def test_a_row_without_a_readable_image(self, vizwiz, kind):
        rows = pq.read_table(self.shard(vizwiz)).to_pylist()
        rows[1]['image']['bytes'] = None if kind == 'path only' else b'no image'
        schema = pq.read_schema(self.shard(vizwiz))
        pq.write_table(pa.Table.from_pylist(rows, schema), self.shard(vizwiz), row_group_size=2)
        if kind == 'path only':
            # Left out as a question without image is.
            assert len(load('vizwiz_vqa_val', vizwiz)) == 5
            return
        with pytest.raises(DataError, match='row group 0, row 1: not a readable image'):
            load('vizwiz_vqa_val', vizwiz)[1].image.read()

    @pytest.mark.parametrize('kind', [pa.string(), pa.struct([('path', pa.string())]), pa.int64()])
    def test_a_column_of_images_without_bytes(self, vizwiz, kind):
        for number in (0, 1):
            table = pq.read_table(self.shard(vizwiz, number)).drop_columns('image')
            table = table.append_column('image', pa.nulls(len(table), kind))
            pq.write_table(table, self.shard(vizwiz, number))
        assert_refused("the column 'image' holds .*, expected the bytes of images", 'vizwiz_vqa_val', vizwiz)

    def test_images_of_gqa_are_missing(self, tmp_path, tmp_path_factory):
        mini.parquet_gqa(tmp_path, mini.gqa(tmp_path_factory.mktemp('source')))
        images = sorted((tmp_path / 'testdev_balanced_images').iterdir())
        pq.write_table(pq.read_table(images[0]).slice(0, 0), images[0])
        assert_refused('1 of 2 images are missing, such as n16131[34]', 'gqa', tmp_path)


class TestNames:
    def test_an_unknown_benchmark(self, tmp_path):
        assert_refused(r"'vqav2_vall': expected one of .*did you mean 'vqav2_val'\?", 'vqav2_vall', tmp_path)
        assert_refused("'numpy:nothing' cannot be imported", 'numpy:nothing', tmp_path)
        assert_refused("'numpy:pi': expected a catalog.Benchmark, not a float", 'numpy:pi', tmp_path)

    def test_a_benchmark_of_ones_own(self, tmp_path, monkeypatch):
        mine = Benchmark('GQA, training', 'answer', 4, 'train_balanced_questions.json', (GqaQuestions('train'),))
        monkeypatch.setattr(mini, 'MINE', mine, raising=False)
        expected = mini.gqa(tmp_path, 'train')
        items = load('miniature_benchmarks:MINE', tmp_path)
        assert [item.id for item in items] == [item.id for item in expected]
        assert items.notes == ()

    def test_no_such_folder(self, tmp_path):
        assert_refused('nothing: no such folder', 'gqa', tmp_path / 'nothing')
        (tmp_path / 'file').touch()
        assert_refused('file: no such folder', 'gqa', tmp_path / 'file')

    def test_an_archive_that_is_not_unpacked(self, tmp_path):
        (tmp_path / 'questions1.2.zip').touch()
        assert_refused('no files of GQA, .*; unpack questions1.2.zip if it holds them', 'gqa', tmp_path)

    def test_files_of_other_things_are_not_in_the_way(self, tmp_path):
        expected = mini.gqa(tmp_path)
        others = {'a.json': b'', 'b.json': b'{', 'c.json': b'[1, 2]', 'd.json': b'7', 'e.json': b'\xff\xfe[\0]\0'}
        others |= {
            'f.json': b'{"a": [], "b": {}}',
            'g.jsonl': b'{"a": 1}\n{"a": 2}\n',
            'h.parquet': b'no',
            'i.json': b'[[]]',
        }
        others |= {'j.json': b'[' * 10**5, 'k.jsonl': b'\n\n', 'l.json': b'{"images": [1], "annotations": [2]}'}
        others['n.json'] = b'{"a": 1, "b": }'
        for name, content in others.items():
            mini.write(tmp_path / name, content)
        (tmp_path / 'm.json').mkdir()
        (tmp_path / 'loop').symlink_to(tmp_path)
        (tmp_path / 'dangling.json').symlink_to(tmp_path / 'nothing')
        discovery = discover(tmp_path)
        assert len(load('gqa', discovery)) == len(expected)
        assert {path.name for path in discovery.unknown} == {'c.json', 'f.json', 'g.jsonl', 'i.json', 'l.json'}
        broken = {re.search(r'(\w)\.\w+[:,]', problem)[1] for problem in discovery.problems}
        assert broken == {'a', 'b', 'd', 'e', 'h', 'j', 'k', 'n'}
        lines = summary(discovery)
        assert all(len(line.splitlines()) == 1 for line in lines)


class TestOthers:
    def test_a_label_of_pope(self, tmp_path):
        mini.pope(tmp_path, tmp_path)
        rows = [{'question_id': 1, 'image': mini.coco_file(310196), 'text': 'Is there?', 'label': 'maybe'}]
        mini.write(tmp_path / 'coco_pope_popular.json', rows)
        assert_refused("popular.json, line 1: label is 'maybe', neither 'yes' nor 'no'", 'pope', tmp_path)

    def test_a_broken_line_of_pope(self, tmp_path):
        mini.pope(tmp_path, tmp_path)
        path = tmp_path / 'coco_pope_random.json'
        first = path.read_text().splitlines()[0]
        path.write_text(f'{first}\n{{"question_id": 2, %\n')
        byte = len(first) + len('\n{"question_id": 2, ')
        assert_refused(f'coco_pope_random.json, line 2: broken JSON at byte {byte:,}: ', 'pope', tmp_path)

    def test_files_of_pope_whose_names_say_nothing(self, tmp_path):
        mini.pope(tmp_path, tmp_path)
        for number, path in enumerate(tmp_path.glob('*.json')):
            path.rename(tmp_path / f'{number}.json')
        assert_refused('the name of a file of POPE must say its category, one of random', 'pope', tmp_path)

    def test_a_missing_category_of_pope(self, tmp_path):
        mini.pope(tmp_path, tmp_path)
        (tmp_path / 'coco_pope_popular.json').unlink()
        assert 'no file of the categories popular' in load('pope', tmp_path).notes

    def test_an_answer_that_is_no_choice(self, tmp_path):
        mini.science_qa(tmp_path)
        edit(tmp_path / 'problems.json', lambda value: value['11'].update(answer=2))
        assert_refused("member '11': answer is 2, but there are 2 choices", 'scienceqa_img', tmp_path)

    def test_captions_of_a_list_for_training(self, tmp_path):
        items = mini.karpathy(tmp_path / 'a.json', tmp_path, 'coco')['test']
        (tmp_path / 'a.json').unlink()
        mini.lavis_captions(tmp_path / 'coco_karpathy_test.json', items, 'val2014')
        edit(tmp_path / 'coco_karpathy_test.json', lambda value: value[1].update(caption='A cat'))
        assert_refused(r'element \[1\]: caption is one text: a list for training', 'coco_karpathy_test', tmp_path)

    @pytest.mark.parametrize(
        ('line', 'reason'),
        [
            ({'question': 'What?'}, "line 2: no field 'image'"),
            ({'image': 'a.jpg', 'references': 'x', 'answer': 'y'}, 'both references and answer'),
            ({'image': 'a.jpg', 'references': [1]}, 'references holds 1, which is not a text'),
            ({'image': 'a.jpg', 'groups': ['x']}, r"groups is \['x'\], not an object"),
            ({'image': 'a.jpg', 'metric': 'cider'}, "metric is 'cider', but an earlier line says 'vqa'"),
            ({'image': 'a.jpg', 'id': 1}, 'the id 1 occurs twice'),
            (['a.jpg'], r"\['a.jpg'\] is not an object"),
        ],
    )
    def test_a_line_of_a_user(self, tmp_path, line, reason):
        mini.write(tmp_path / 'a.jpg', mini.image(1))
        first = {'image': 'a.jpg', 'question': 'What?', 'answer': 'x', 'metric': 'vqa'}
        mini.write(tmp_path / 'data.jsonl', [first, line])
        assert_refused(f'data.jsonl, line 2: .*{reason}' if 'line 2' not in reason else reason, str(tmp_path), '.')

    def test_no_line_of_a_user(self, tmp_path):
        mini.write(tmp_path / 'data.jsonl', [])
        assert_refused('no line to evaluate', str(tmp_path), '.')


WRITERS = {
    'vqav2_val': mini.vqav2,
    'ok_vqa_val2014': mini.ok_vqa,
    'gqa': mini.gqa,
    'nocaps_val': mini.nocaps,
    'coco2014_cap_val': mini.coco_captions,
    'coco_karpathy_test': lambda root: mini.karpathy(root / 'dataset_coco.json', root, 'coco'),
    'textvqa_val': mini.text_vqa,
    'vizwiz_vqa_val': mini.vizwiz,
    'scienceqa_img': mini.science_qa,
    'pope': lambda root: mini.pope(root, root),
}


def read_all(name, root):
    """Read a benchmark and its images, or return why not."""
    reason = ''
    try:
        items = load(name, root, tolerance=1.0)
        for item in items:
            item.image.read()
    except DataError as error:
        reason = str(error)
    assert len(reason.splitlines()) <= 1, reason
    return reason


@pytest.mark.parametrize('alterations', [12, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', WRITERS)
@pytest.mark.slow
def test_altered_files_are_read_or_refused(tmp_path, name, alterations):
    """Whatever is altered, in bytes or in the structure: the result is a value or a `DataError` of one line."""
    rng = random.Random(f'{name}{alterations}')
    WRITERS[name](tmp_path)
    files = [path for path in sorted(tmp_path.rglob('*')) if path.is_file()]
    annotations = [path for path in files if path.suffix == '.json']
    reasons = set()
    for _ in range(alterations):
        path = rng.choice(annotations if rng.random() < 0.8 else files)
        content = path.read_bytes()
        if path.suffix == '.json' and name != 'pope' and rng.random() < 0.7:
            path.write_text(json.dumps(alter_json(json.loads(content), rng)))
        else:
            path.write_bytes(alter(content, rng))
        reasons.add(read_all(name, tmp_path))
        path.write_bytes(content)
    assert read_all(name, tmp_path) == ''
    assert len(reasons) > (1 if alterations < 100 else 10)  # the alterations do reach the readers


@pytest.mark.parametrize('alterations', [20, pytest.param(600, marks=pytest.mark.slow)])
def test_altered_parquet_files_are_read_or_refused(tmp_path, tmp_path_factory, alterations):
    rng = random.Random(alterations)
    mini.parquet_vqav2(tmp_path, mini.vqav2(tmp_path_factory.mktemp('source')))
    paths = sorted(tmp_path.rglob('*.parquet'))
    for _ in range(alterations):
        path = rng.choice(paths)
        content = path.read_bytes()
        # Written anew, as a reader of the former content may have mapped the old file.
        path.unlink()
        path.write_bytes(alter(content, rng))
        read_all('vqav2_val', tmp_path)
        path.unlink()
        path.write_bytes(content)
    assert np.asarray(load('vqav2_val', tmp_path)[0].image.read()).ndim == 3
