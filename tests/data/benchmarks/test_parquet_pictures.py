"""Images in parquet files are read row by row, from the row group that holds them."""

import random
import threading

import miniature_benchmarks as mini
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparselora_jax.data.benchmarks import parquet_pictures
from sparselora_jax.data.benchmarks.parquet_pictures import list_pictures, rows_without_image


@pytest.fixture
def files(tmp_path):
    """(two files of 25 and 14 images in row groups of ten, the images)."""
    images = [mini.image(number) for number in range(39)]
    paths = []
    for number, rows in enumerate((images[:25], images[25:])):
        structs = pa.array([{'bytes': data, 'path': 'a.jpg'} for data in rows], mini.IMAGE_TYPE)
        path = tmp_path / f'{number}.parquet'
        pq.write_table(pa.table({'n': range(len(rows)), 'image': structs}), path, row_group_size=10)
        paths.append(path)
    return paths, images


def read_bytes(picture):
    return parquet_pictures._open_group(picture.path, picture.group, picture.column).read(picture.row)


@pytest.mark.parametrize('order', ['forwards', 'backwards', 'mixed'])
def test_each_row_is_its_image(files, order):
    paths, images = files
    pictures = list_pictures(paths, 'image')
    assert len(pictures) == len(images)
    indices = list(range(len(images)))
    if order == 'backwards':
        indices.reverse()
    elif order == 'mixed':
        random.Random(0).shuffle(indices)
    for index in indices:
        assert read_bytes(pictures[index]) == images[index]
    with pytest.raises(IndexError):
        pictures[len(images)]


def test_threads_share_a_reader(files):
    paths, images = files
    pictures = list_pictures(paths, 'image')
    wrong = []

    def read(seed):
        chosen = random.Random(seed).choices(range(len(images)), k=50)
        wrong.extend(index for index in chosen if read_bytes(pictures[index]) != images[index])

    threads = [threading.Thread(target=read, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_row_group_is_read_once_by_threads_that_are_a_few_rows_apart(tmp_path, monkeypatch):
    images = [mini.image(number) for number in range(40)]
    pq.write_table(pa.table({'image': pa.array(images, pa.binary())}), tmp_path / 'a.parquet')
    pictures = list_pictures([tmp_path / 'a.parquet'], 'image')
    starts = []
    read = parquet_pictures._read_bytes
    monkeypatch.setattr(parquet_pictures, '_read_bytes', lambda *arguments: starts.append(0) or read(*arguments))
    # Each row after one that is seven rows further on.
    indices = [index for row in range(33) for index in (row + 7, row)]
    assert [read_bytes(pictures[index]) for index in indices] == [images[index] for index in indices]
    assert len(starts) == 1


def test_a_column_may_hold_plain_bytes(tmp_path):
    data = mini.image(3)
    pq.write_table(pa.table({'image': pa.array([data], pa.binary())}), tmp_path / 'a.parquet')
    assert read_bytes(list_pictures([tmp_path / 'a.parquet'], 'image')[0]) == data


@pytest.mark.parametrize('statistics', [True, False])
def test_rows_without_image_are_found(tmp_path, statistics):
    data = mini.image(3)
    values = [{'bytes': data, 'path': None}, None, {'bytes': None, 'path': 'a.jpg'}] * 7
    table = pa.table({'image': pa.array(values, mini.IMAGE_TYPE)})
    pq.write_table(table, tmp_path / 'a.parquet', row_group_size=4, write_statistics=statistics)
    want = [row for row, value in enumerate(values) if not value or not value['bytes']]
    assert rows_without_image(tmp_path / 'a.parquet', 'image').tolist() == want


def test_counts_in_the_footer_spare_reading_the_images(files, monkeypatch):
    paths, _ = files

    def refuse(*arguments):
        raise AssertionError('the images were read')

    monkeypatch.setattr(parquet_pictures, '_read_bytes', refuse)
    assert rows_without_image(paths[0], 'image').tolist() == []
