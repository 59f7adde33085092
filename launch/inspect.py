"""Describe a model, what a recipe prunes and trains in it, and the memory of each stage, from shapes alone.

python launch/inspect.py Salesforce/blip2-opt-2.7b
python launch/inspect.py DIRECTORY --config=configs/llava_both.py:hardware=gpu,pattern=4:8 --config.restore.batch=32
python launch/inspect.py configs/blip2_lang_only.py

MODEL is the first argument: a Hugging Face directory, a hub id or a recipe of configs/. Hub ids that are listed in
`sparselora_jax/planning/published.py` need no network. A recipe stands for its own model. Without --config, the recipe
is the family's `*_lang_only`.
"""

import sys
from collections.abc import Sequence
from typing import Any

import cli

from configs import files
from sparselora_jax import recipe
from sparselora_jax.models.model import abstract_params
from sparselora_jax.planning import inspection, memory
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.weights import LoraSpec

GIB = 2**30

# A recipe in place of the model is turned into `--config`. This comes before the flag's definition, which reads the
# command line.
if len(sys.argv) > 1 and not sys.argv[1].startswith('-') and files.names_config(sys.argv[1]):
    sys.argv[1] = f'--config={sys.argv[1]}'
CONFIG = cli.define_recipe(None)


def main(argv: list[str]) -> None:
    """Print the tables."""
    config = CONFIG.value
    model = cli.find_model(argv, config)
    print_model(model)
    # Without a recipe, the defaults of the family show what one would do.
    config = config or cli.family_recipe(model.cfg)
    if config is None:
        print(f'\n{cli.no_recipe(model.cfg)}')
        return
    recipe.check_values(config)
    recipe.check_family(config, model.cfg)
    trees = memory.recipe(model.cfg, config)
    print_recipe(trees)
    print_rules(trees)
    print_memory(trees)


def print_model(model: cli.ModelConfig) -> None:
    """Print the size of each tower and of the whole model."""
    params = abstract_params(model.cfg)
    towers = inspection.towers(model.cfg, params)
    rows = [
        # A projection between towers has no blocks.
        (tower.name, tower.blocks or '', tower.width, f'{tower.parameters:,}', f'{tower.share:.1%}')
        for tower in towers
    ]
    rows.append(('total', sum(tower.blocks for tower in towers), '', f'{inspection.count(params):,}', ''))
    print(f'{model.name}: {model.cfg.family.name}\n')
    print_table(('tower', 'blocks', 'width', 'parameters', 'share'), rows, left=1)
    unread = model.cfg.family.unread(model.hf, model.cfg) if model.hf else {}
    if unread:
        print('\nin the checkpoint, but not read: ' + '; '.join(f'{part}, {size:,}' for part, size in unread.items()))


def print_recipe(trees: memory.Recipe) -> None:
    """Print how a recipe prunes and restores, and in which towers."""
    config = trees.config
    mesh = ' '.join(f'{axis}={size}' for axis, size in config.mesh.items())
    prune = config.prune
    restore = config.restore
    print(f'\nrecipe: {config.dtype} on a mesh of {mesh}; pruning by {prune.method}, {prune.samples} samples,')
    print(f'{prune.chunk} at a time; restoring in batches of {restore.batch} in {restore.accumulate} parts')
    # A recipe is named after the towers that it prunes. LoRA is trained in every tower whose rank is not 0.
    trained = 'the pruned kernels' if restore.trained == 'weights' else f'LoRA in {_towers_of(trees.lora)}'
    print(f'pruned: {_towers_of(trees.masks)}; trained: {trained}')


def _towers_of(tree: dict[str, Any]) -> str:
    """Return the names of the towers that a tree has leaves in."""
    towers = {path.partition('/')[0] for path in rules.flatten(tree)}
    return ', '.join(sorted(towers)) or 'no tower'


def print_rules(trees: memory.Recipe) -> None:
    """Print what each rule matches, and what stays dense."""
    rule_lists = {
        'prune rule': recipe.prune_rules(trees.config),
        'LoRA rule': recipe.lora_rules(trees.config),
    }
    # These are the rules that a job uses, so the tables show what a job would do.
    for title, rule_list in rule_lists.items():
        rows = [
            (
                match.regex,
                _value(match.value),
                len(match.paths),
                match.matrices,
                f'{match.parameters:,}',
                _examples(match.paths),
            )
            for match in inspection.matches(trees.params, rule_list)
        ]
        print()
        print_table((title, 'value', 'kernels', 'matrices', 'parameters', 'e.g.'), rows, left=2)
    dense = inspection.dense_groups(trees.params, list(rules.flatten(trees.masks)))
    print()
    print_table(('stays dense', 'parameters'), [(name, f'{size:,}') for name, size in dense.items()], left=1)


def _value(value: Any) -> str:
    """Return the value of a rule as text: a pattern, a `LoraSpec`, or none."""
    if value is None:
        return 'none'
    return f'rank {value.rank}, alpha {value.alpha:g}' if isinstance(value, LoraSpec) else str(value)


def _examples(paths: Sequence[str]) -> str:
    """Return the first two paths."""
    return ', '.join(paths[:2]) + (', ...' if len(paths) > 2 else '')


def print_memory(trees: memory.Recipe) -> None:
    """Print the terms of each stage's memory; the total counts only the moment with the highest use."""
    rows = []
    for title, estimate in memory.STAGES.items():
        stage = estimate(trees)
        if not stage.held:
            # The recipe does not have this stage, for example rounding without a four-bit base.
            continue
        rows.append((title, '', f'{stage.total / GIB:.2f}'))
        rows += [('', term, f'{size / GIB:.3f}') for term, size in stage.held.items()]
        totals = {moment: sum(terms.values()) for moment, terms in stage.moments.items()}
        highest = max(totals, key=totals.get, default=None)
        for moment, terms in stage.moments.items():
            note = '' if moment == highest else ', not the highest moment'
            rows.append(('', f'{moment}{note}', ''))
            rows += [('', f'  {term}', f'{size / GIB:.3f}') for term, size in terms.items()]
    print('\nmemory of one device, without what the compiler adds')
    print_table(('stage', 'of which', 'GiB'), rows, left=2)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, left: int) -> None:
    """Print aligned columns.

    Args:
      header: of the columns.
      rows: cells, printed as `str` makes them.
      left: number of columns at the left that hold text and are left-aligned, as is the column `e.g.`. All other
        columns hold numbers and are right-aligned.
    """
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = []
        for index, (cell, width) in enumerate(zip(line, widths, strict=True)):
            is_text = index < left or header[index] == 'e.g.'
            cells.append(cell.ljust(width) if is_text else cell.rjust(width))
        print('  '.join(cells).rstrip())


if __name__ == '__main__':
    cli.run(main, '[MODEL]')
