"""Images are found by name in whatever folder they lie, and by the other names of COCO's releases."""

import os
from pathlib import Path

import miniature_benchmarks as mini
import numpy as np
import pytest
from PIL import Image

from sparselora_jax.data.benchmarks.picture_files import FileTree, list_files, locate, locate_by_path
from sparselora_jax.runtime.errors import DataError


def tree_of(*paths):
    """A tree of image files that are not there; nothing is opened to find them."""
    folders = {}
    for path in paths:
        folder, _, name = path.rpartition('/')
        folders.setdefault(folder, set()).add(name)
    return FileTree(Path('root'), {folder: frozenset(names) for folder, names in folders.items()}, ())


def found(pictures):
    return [picture.name for picture in pictures]


@pytest.mark.parametrize('folder', ['val2014', 'coco/val2014', 'a/b/images', ''])
@pytest.mark.parametrize('written', ['COCO_val2014_{}.jpg', 'COCO_train2014_{}.jpg', '{}.jpg'])
@pytest.mark.parametrize('asked', ['val2014/COCO_val2014_{}.jpg', '{}.jpg', 'COCO_train2014_{}.jpg'])
def test_an_image_of_coco_has_several_names(folder, written, asked):
    number = f'{42:012d}'
    path = f'{folder}/{written.format(number)}'.lstrip('/')
    assert found(locate(tree_of(path), [asked.format(number)])) == [f'root/{path}']


def test_the_folder_that_the_data_set_names_is_taken_first():
    tree = tree_of('a/x.jpg', 'a/y.jpg', 'b/val/x.jpg', 'val_small/x.jpg')
    assert found(locate(tree, ['val/x.jpg', 'val/y.jpg'])) == ['root/b/val/x.jpg', 'root/a/y.jpg']


def test_then_the_usual_folder_and_then_the_one_with_most_of_the_images():
    """GQA and Flickr30k name their images by numbers, and some numbers occur in both."""
    tree = tree_of('gqa/images/1.jpg', 'gqa/images/2.jpg', 'flickr/images/1.jpg', 'a/1.jpg', 'z/1.jpg', 'z/2.jpg')
    assert found(locate(tree, ['1.jpg', '2.jpg'], ['gqa/images'])) == ['root/gqa/images/1.jpg', 'root/gqa/images/2.jpg']
    assert found(locate(tree, ['1.jpg', '2.jpg'])) == ['root/gqa/images/1.jpg', 'root/gqa/images/2.jpg']
    assert found(locate(tree, ['1.jpg'], ['images'])) == ['root/flickr/images/1.jpg']


def test_missing_images_keep_their_numbers():
    pictures = locate(tree_of('a/1.jpg', 'a/3.jpg'), ['1.jpg', '2.jpg', '3.jpg'])
    assert pictures.missing.tolist() == [1]
    assert found(pictures) == ['root/a/1.jpg', '2.jpg', 'root/a/3.jpg']


def test_paths_count_where_all_files_have_the_same_name():
    tree = tree_of('s/train/1/image.png', 's/test/1/image.png', 's/test/2/image.png', 'copy/test/2/image.png')
    pictures = locate_by_path(tree, ['test/1/image.png', 'test/2/image.png', 'test/3/image.png'])
    assert found(pictures) == ['root/s/test/1/image.png', 'root/s/test/2/image.png', 'test/3/image.png']
    assert pictures.missing.tolist() == [2]


def test_files_are_listed_once_through_links(tmp_path):
    outside = tmp_path / 'disk'
    mini.write(outside / 'val2014' / 'a.jpg', mini.image(1))
    mini.write(tmp_path / 'data' / 'x.JSON', [])
    mini.write(tmp_path / 'data' / '.hidden' / 'b.jpg', mini.image(1))
    mini.write(tmp_path / 'data' / '__MACOSX' / 'c.jpg', b'no image')
    (tmp_path / 'data' / 'coco').symlink_to(outside)
    (outside / 'loop').symlink_to(tmp_path / 'data')
    tree = list_files(tmp_path / 'data')
    assert tree.image_folders == {'coco/val2014': frozenset(['a.jpg'])}
    assert [path.name for path in tree.data_files] == ['x.JSON']
    assert tree.problems == ()


@pytest.mark.skipif(os.geteuid() == 0, reason='the superuser may read all folders')
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / 'closed').mkdir(mode=0)
    assert list_files(tmp_path).problems == (f'{tmp_path}/closed: no permission; change it, or name another place',)


def test_pixels_are_those_of_public_evaluation_code(tmp_path):
    """That is `convert('RGB')` alone: EXIF does not turn the image, and alpha is dropped."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.png', exif=exif)
    Image.fromarray(pixels[..., 0]).convert('P').save(tmp_path / 'b.png', transparency=0)
    pictures = locate(list_files(tmp_path), ['a.png', 'b.png'])
    for picture in pictures:
        np.testing.assert_array_equal(picture.read(), np.asarray(Image.open(picture.path).convert('RGB')))
    np.testing.assert_array_equal(pictures[0].read(), pixels[..., :3])


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match='no such folder; name the folder that holds the data'):
        list_files(tmp_path / 'nothing')
