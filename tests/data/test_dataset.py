"""A recipe names a data set by its name, by a folder, or as package.module:Name."""

import sys
from pathlib import Path

import pytest

from sparselora_jax.data import easy_vqa
from sparselora_jax.data.dataset import DATASETS, DataRequest, Dataset, Loader, Split
from sparselora_jax.data.loaders import find_loader
from sparselora_jax.data.mixture import MixtureLoader
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.registry import UnknownNameError


class Counting:
    """A data set of one's own: how many dots there are."""

    kinds = ('few', 'many')

    def __call__(self, request):
        records = [{'image': None, 'question': request.data, 'answer': str(count)} for count in range(4)]
        split = Split(records, lambda: [(record['question'], record['answer']) for record in records])
        return Dataset(split, split, self.kinds, lambda answer: self.kinds[int(answer) > 1])


COUNTING = Counting()


def test_a_registered_name_is_found():
    loader = find_loader('easy_vqa')
    assert isinstance(loader, easy_vqa.EasyVqaLoader)
    assert loader.kinds == ('yes/no', 'shape', 'colour')
    assert 'easy_vqa' in DATASETS


def test_an_object_of_another_module_is_imported():
    name = f'{__name__}:COUNTING'
    loader = find_loader(name)
    assert loader is sys.modules[__name__].COUNTING
    assert isinstance(loader, Loader)
    dataset = loader(DataRequest(name, Path('not read')))
    assert dataset.test.read_texts()[3] == (name, '3')
    assert dataset.kind_of('3') == 'many'


def test_a_folder_is_one_even_with_a_colon_in_its_name(tmp_path):
    assert isinstance(find_loader(str(tmp_path)), MixtureLoader)
    path = tmp_path / 'json:dumps'
    path.mkdir()
    assert isinstance(find_loader(str(path)), MixtureLoader)
    with pytest.raises(DataError, match=r'absent: no such folder; expected a folder, .* or one of easy_vqa'):
        find_loader('absent')(DataRequest('absent', tmp_path))


@pytest.mark.parametrize('name', ['no_such_module:Data', 'json:NoSuchName', 'json:dumps', f'{__name__}:Counting'])
def test_what_cannot_be_imported_or_is_no_loader_is_named(name):
    with pytest.raises(UnknownNameError, match=f"data set '{name}'"):
        find_loader(name)
