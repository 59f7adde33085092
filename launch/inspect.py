"""What a model consists of, what a recipe prunes and adapts in it, and what memory each stage takes: from shapes alone.

python launch/inspect.py Salesforce/blip2-opt-2.7b
python launch/inspect.py DIRECTORY --config=configs/llava_both.py:hardware=gpu,pattern=4:8 --config.restore.batch=32
python launch/inspect.py configs/blip2_lang_only.py

MODEL comes first: a Hugging Face directory, a hub id (those of `sparselora_jax/models/published.py` need no network) or
a config of configs/, whose own model is taken. Without --config the recipe is the family's `*_lang_only`.
"""

import sys

import cli

from sparselora_jax import recipe
from sparselora_jax.models.model import abstract_params
from sparselora_jax.planning import inspection, memory
from sparselora_jax.sparse import rules

GIB = 2**30

if len(sys.argv) > 1 and (path := cli.find_recipe(sys.argv[1])):
    sys.argv[1] = f'--config={path}'
CONFIG = cli.define_recipe(None)


def main(argv):
    """Prints the tables."""
    config = CONFIG.value
    name, hf, cfg = cli.find_model(argv, config)
    print_model(name, cfg.family.name, hf, cfg)
    config = config or cli.family_recipe(cfg)
    if config is None:
        print('\nno recipe for a language model alone: give one with --config=...')
        return
    recipe.check_values(config)
    made = memory.recipe(cfg, config)
    print_rules(made)
    print_memory(made)


def print_model(name, family, hf, cfg):
    """The towers and the whole."""
    params = abstract_params(cfg)
    towers = inspection.towers(cfg, params)
    rows = [(t.name, t.blocks or '', t.width, f'{t.parameters:,}', f'{t.share:.1%}') for t in towers]
    rows.append(('total', sum(t.blocks for t in towers), '', f'{inspection.count(params):,}', ''))
    print(f'{name}: {family}\n')
    print_table(('tower', 'blocks', 'width', 'parameters', 'share'), rows, left=1)
    unread = cfg.family.unread(hf, cfg) if hf else {}
    if unread:
        print('\nin the checkpoint, but not read: ' + '; '.join(f'{what}, {size:,}' for what, size in unread.items()))


def print_rules(made):
    """What each rule matches, and what stays dense."""
    config = made.config
    mesh = ' '.join(f'{axis}={size}' for axis, size in config.mesh.items())
    prune, restore = config.prune, config.restore
    print(f'\nrecipe: {config.dtype} on a mesh of {mesh}; pruning by {prune.method}, {prune.samples} samples,')
    print(f'{prune.chunk} at a time; restoring in batches of {restore.batch} in {restore.accumulate} parts')
    lists = {'prune rule': recipe.prune_rules(config), 'LoRA rule': recipe.lora_rules(config)}
    for title, listed in lists.items():
        rows = [
            (m.regex, _value(m.value), len(m.paths), m.matrices, f'{m.parameters:,}', _examples(m.paths))
            for m in inspection.matches(made.params, listed)
        ]
        print()
        print_table((title, 'value', 'kernels', 'matrices', 'parameters', 'e.g.'), rows, left=2)
    dense = inspection.dense_groups(made.params, list(rules.flatten(made.masks)))
    print()
    print_table(('stays dense', 'parameters'), [(name, f'{size:,}') for name, size in dense.items()], left=1)


def _value(value) -> str:
    if value is None:
        return 'none'
    return f'rank {value.rank}, alpha {value.alpha:g}' if hasattr(value, 'rank') else str(value)


def _examples(paths) -> str:
    return ', '.join(paths[:2]) + (', ...' if len(paths) > 2 else '')


def print_memory(made):
    """Each stage's terms; of its moments only the highest counts."""
    rows = []
    for title, stage in memory.STAGES.items():
        found = stage(made)
        if not found.held:  # the recipe has no such stage
            continue
        rows.append((title, '', f'{found.total / GIB:.2f}'))
        rows += [('', term, f'{size / GIB:.3f}') for term, size in found.held.items()]
        highest = max(found.moments, key=lambda name, of=found.moments: sum(of[name].values()), default=None)
        for moment, terms in found.moments.items():
            note = '' if moment == highest else ', not the highest moment'
            rows.append(('', f'{moment}{note}', ''))
            rows += [('', f'  {term}', f'{size / GIB:.3f}') for term, size in terms.items()]
    print('\nmemory of one device, without what the compiler adds')
    print_table(('stage', 'of which', 'GiB'), rows, left=2)


def print_table(header, rows, *, left):
    """Columns aligned; the first `left` of them, and texts behind the numbers, to the left."""
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    texts = [i < left or header[i] == 'e.g.' for i in range(len(header))]
    for row in rows:
        cells = [c.ljust(w) if text else c.rjust(w) for c, w, text in zip(row, widths, texts, strict=True)]
        print('  '.join(cells).rstrip())


if __name__ == '__main__':
    cli.run(main)
