"""How a checkpoint's tensors are named: what a key table is made of.

A table maps our path to the name of a torch module's parameter. `{i}` in a name is the layer; of stacked pairs of
layers, `{even}` and `{odd}` are the first's and the second's.
"""

from typing import NamedTuple


class Part(NamedTuple):
    """Slice `index` of `of` equal slices of a fused tensor, along its first axis."""

    name: str
    index: int
    of: int


Keys = dict[str, str | Part]


def dense(ours: str, theirs: str, *, bias: bool = True) -> Keys:
    """A linear layer or a convolution over patches.

    >>> dense('mlp/fc1', 'mlp.fc1', bias=False)
    {'mlp/fc1/kernel': 'mlp.fc1.weight'}
    """
    return {f'{ours}/kernel': f'{theirs}.weight'} | ({f'{ours}/bias': f'{theirs}.bias'} if bias else {})


def norm(ours: str, theirs: str) -> Keys:
    """A LayerNorm with scale and bias."""
    return {f'{ours}/scale': f'{theirs}.weight', f'{ours}/bias': f'{theirs}.bias'}


def nested(table: Keys, path: str, prefix: str) -> Keys:
    """A table under a path of ours and a prefix of theirs.

    >>> nested({'norm/scale': 'norm.weight'}, 'language/', 'language_model.model.')
    {'language/norm/scale': 'language_model.model.norm.weight'}
    """
    return {
        path + ours: name._replace(name=prefix + name.name) if isinstance(name, Part) else prefix + name
        for ours, name in table.items()
    }
