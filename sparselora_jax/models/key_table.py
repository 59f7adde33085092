"""Key tables: the names of tensors in checkpoints.

A table maps our path to the name of a torch parameter. `{i}` in a name is the layer index. For stacked pairs of layers,
`{even}` and `{odd}` are the indices of the first and the second layer.
"""

from typing import NamedTuple


class Part(NamedTuple):
    """Slice `index` of `of` equal slices of a fused tensor, along its first axis."""

    name: str
    index: int
    of: int  # number of slices: 3 for EVA-CLIP's q, k and v


Keys = dict[str, str | Part]


def dense(ours: str, theirs: str, *, bias: bool = True) -> Keys:
    """Name a linear layer, or a convolution over patches.

    Args:
      ours: our path of the layer.
      theirs: the torch module's name.
      bias: whether the layer has a bias.

    Returns:
      A table of kernel and bias.

    >>> dense('mlp/fc1', 'mlp.fc1', bias=False)
    {'mlp/fc1/kernel': 'mlp.fc1.weight'}
    """
    table: Keys = {f'{ours}/kernel': f'{theirs}.weight'}
    if bias:
        table[f'{ours}/bias'] = f'{theirs}.bias'
    return table


def norm(ours: str, theirs: str, *, bias: bool = True) -> Keys:
    """Name a LayerNorm with scale and bias, or an RMSNorm with a scale alone.

    Args:
      ours: our path of the norm.
      theirs: the torch module's name.
      bias: whether the norm has a bias.

    Returns:
      A table of scale and bias.
    """
    # torch calls the scale of a norm `weight`.
    table: Keys = {f'{ours}/scale': f'{theirs}.weight'}
    if bias:
        table[f'{ours}/bias'] = f'{theirs}.bias'
    return table


def nested(table: Keys, path: str, prefix: str) -> Keys:
    """Add a prefix to our paths and to the torch names of a table.

    Args:
      table: the table of a part of a model.
      path: prefix of our paths.
      prefix: prefix of the torch names.

    Returns:
      The table of that part within the whole model.

    >>> nested({'norm/scale': 'norm.weight'}, 'language/', 'language_model.model.')
    {'language/norm/scale': 'language_model.model.norm.weight'}
    """
    # Placeholders such as `{i}` stay in the names: `checkpoints.layout` fills them in.
    moved: Keys = {}
    for ours, name in table.items():
        if isinstance(name, Part):
            moved[path + ours] = name._replace(name=prefix + name.name)
        else:
            moved[path + ours] = prefix + name
    return moved
