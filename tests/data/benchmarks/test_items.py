"""Items in columns: what goes in comes out, and a refused item leaves nothing behind."""

import pytest

from sparselora_jax.data.benchmarks.items import ItemsBuilder
from sparselora_jax.data.benchmarks.picture_files import MissingPicture
from sparselora_jax.runtime.errors import DataError


def test_fields_and_their_absence():
    builder = ItemsBuilder('mine')
    first = builder.image_file('a.jpg', 7)
    second = builder.image_file('b.jpg', 'b')
    assert builder.image_file('a.jpg', 7) == first
    builder.add(5, first, question='', references=['x', 'y', 'x'], groups={'kind': 'k', 'none': ''})
    builder.add(3, second)
    builder.add(4, first, question='x', choices=('x', 'z'), context='c', groups={'late': 'l'})
    items = builder.build([MissingPicture('a'), MissingPicture('b')])
    assert [item.id for item in items] == [5, 3, 4]
    assert [item.image_id for item in items] == [7, 'b', 7]
    assert [item.image.name for item in items] == ['a', 'b', 'a']
    assert [item.question for item in items] == ['', None, 'x']
    assert [item.references for item in items] == [('x', 'y', 'x'), (), ()]
    assert [item.choices for item in items] == [(), (), ('x', 'z')]
    assert [item.context for item in items] == ['', '', 'c']
    assert [item.groups for item in items] == [{'kind': 'k'}, {}, {'late': 'l'}]
    assert items.references.lengths.tolist() == [3, 0, 0]
    assert repr(items) == '<3 items of mine>'


def test_ids_may_be_texts_and_numbers():
    builder = ItemsBuilder('mine')
    for identifier in (1, '1', 'a', 2**62):
        builder.add(identifier, builder.image_file('a.jpg', 'a'))
    assert [item.id for item in builder.build([MissingPicture('a')])] == [1, '1', 'a', 2**62]


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        ({'identifier': 1}, 'the id 1 occurs twice'),
        ({'identifier': 2, 'references': ['a', '\ud800']}, 'half of a surrogate pair'),
        ({'identifier': 2, 'groups': {'kind': '\udfff'}}, 'half of a surrogate pair'),
    ],
)
def test_a_refused_item_leaves_nothing_behind(arguments, reason):
    builder = ItemsBuilder('mine')
    image = builder.image_file('a.jpg', 'a')
    builder.add(1, image, references=['a'])
    with pytest.raises(DataError, match=reason):
        builder.add(image=image, **arguments)
    builder.add(3, image, references=['b'])
    assert [(item.id, item.references) for item in builder.build([MissingPicture('a')])] == [(1, ('a',)), (3, ('b',))]
