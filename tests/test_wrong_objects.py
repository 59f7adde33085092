"""Wrong objects given to the library's functions end in one line that shows the right call."""

import json
import subprocess
import sys

# Run without the checks of types that other tests run with, as a user's program runs.
PROGRAM = """
import json
import jax
import jax.numpy as jnp
import optax
import sparselora_jax as sl
from sparselora_jax.runtime.errors import SparseloraError

params = {'q': {'kernel': jnp.ones((8, 4))}}
every = [('.*', '2:4')]
masks = {'q': {'kernel': jnp.ones((8, 4), bool)}}
_, pruned = sl.prune_tree(params, None, every, method=sl.Magnitude())
lora = sl.init_lora(jax.random.key(0), params, [('.*', (2, 4))])
calls = {
    'method name': lambda: sl.prune_tree(params, None, every, method='wanda'),
    'method class': lambda: sl.prune_tree(params, None, every, method=sl.Wanda),
    'method none': lambda: sl.prune_tree(params, None, every, method=None),
    'rules dict': lambda: sl.prune_tree(params, None, {'.*': '2:4'}, method=sl.Magnitude()),
    'rules text': lambda: sl.prune_tree(params, None, '2:4', method=sl.Magnitude()),
    'rules none': lambda: sl.prune_tree(params, None, None, method=sl.Magnitude()),
    'rules of texts': lambda: sl.prune_tree(params, None, ['.*'], method=sl.Magnitude()),
    'rules of triples': lambda: sl.prune_tree(params, None, [('.*', '2:4', 1)], method=sl.Magnitude()),
    'rules of numbers': lambda: sl.prune_tree(params, None, [(1, '2:4')], method=sl.Magnitude()),
    'pattern none': lambda: sl.prune_tree(params, None, [('.*', None)], method=sl.Magnitude()),
    'params list': lambda: sl.prune_tree([jnp.ones((8, 4))], None, every, method=sl.Magnitude()),
    'params none': lambda: sl.prune_tree(None, None, every, method=sl.Magnitude()),
    'lora rules dict': lambda: sl.init_lora(jax.random.key(0), params, {'.*': (2, 4)}),
    'lora number': lambda: sl.init_lora(jax.random.key(0), params, [('.*', 8)]),
    'lora text': lambda: sl.init_lora(jax.random.key(0), params, [('.*', 'ab')]),
    'lora rank zero': lambda: sl.init_lora(jax.random.key(0), params, [('.*', (0, 4))]),
    'lora axes text': lambda: sl.init_lora(jax.random.key(0), params, [('.*', (2, 4))], axes='io'),
    'lora axes of texts': lambda: sl.init_lora(jax.random.key(0), params, [('.*', (2, 4))], axes={'q/kernel': 'io'}),
    'pack axes text': lambda: sl.pack(params, pruned, axes='io'),
    'masks axes text': lambda: sl.check_masks(pruned, every, axes='io'),
    'lora of init_lora as masks': lambda: sl.merge(params, lora),
    'masks as lora': lambda: sl.merge(params, None, masks),
    'masks list': lambda: sl.bind(params, [masks]),
    'mask shape': lambda: sl.check_sparse(params, {'q': {'kernel': jnp.ones((4,), bool)}}),
    'forward model': lambda: sl.prune('model', params, [{}], every, method=sl.Magnitude()),
    'one batch': lambda: sl.prune(lambda w, b, run: w, params, {'x': jnp.ones(3)}, every, method=sl.Magnitude()),
    'batches of arrays': lambda: sl.prune(lambda w, b, run: w, params, [jnp.ones(3)], every, method=sl.Magnitude()),
    'reconstruct number': lambda: sl.prune(
        lambda w, b, run: w, params, [{'x': jnp.ones(3)}], every, method=sl.Magnitude(), reconstruct=4
    ),
    'reconstruct class': lambda: sl.prune(
        lambda w, b, run: w, params, [{'x': jnp.ones(3)}], every, method=sl.Magnitude(), reconstruct=sl.Reconstruct
    ),
    'reconstruct batch': lambda: sl.Reconstruct(batch=1.5),
    'reconstruct rate': lambda: sl.Reconstruct(rate='fast'),
    'collect forward': lambda: sl.collect(params, params, [jnp.ones((2, 8))]),
    'collect one batch': lambda: sl.collect(lambda w, b: b, params, {'x': jnp.ones(3)}),
    'generate tuple': lambda: sl.generate(('model', params), params, {}),
    'generate text': lambda: sl.generate(None, params, 'what is it?'),
    'load number': lambda: sl.load_model(12),
    'load none': lambda: sl.load_model(None),
    'save text': lambda: sl.save_safetensors('never.safetensors', {'a': 'text'}),
    'save list': lambda: sl.save_safetensors('never.safetensors', [jnp.ones(2)]),
    'bound twice': lambda: sl.bind(sl.bind(params, masks, lora), masks, lora),
    'factors array': lambda: sl.effective_weight(jnp.ones((8, 4)), None, jnp.ones((8, 4))),
    'effective mask shape': lambda: sl.effective_weight(jnp.ones((8, 4)), jnp.ones((4, 4), bool)),
    'load mesh': lambda: sl.load_model('embedded', mesh='x'),
    'kernel none': lambda: sl.prune_tree({'q': {'kernel': None}}, None, every, method=sl.Magnitude()),
    'format none': lambda: sl.pack(params, masks, [('.*', None)]),
    'collect forward of one': lambda: sl.collect(lambda w: w, params, [jnp.ones((2, 8))]),
    'prune forward of one': lambda: sl.prune(lambda w: w, params, [{'x': jnp.ones(3)}], every, method=sl.Wanda()),
    'collect select': lambda: sl.collect(lambda w, b: b, params, [jnp.ones((2, 8))], select='q'),
    'collect weights': lambda: sl.collect(lambda w, b: b, params, [jnp.ones((2, 8))], weights=jnp.ones(2)),
    'merge dtype': lambda: sl.merge(params, masks, lora, dtype='int8'),
    'unpack dtype': lambda: sl.unpack(params, dtype='int8'),
    'dtype name': lambda: sl.merge(params, masks, lora, dtype='half precision'),
    'pack inf': lambda: sl.pack({'q': {'kernel': jnp.full((8, 4), jnp.inf)}}, pruned, 'packed24_int4'),
    'gradient': lambda: sl.bind(params, masks, lora, gradient='none'),
}
said = {}
for name, call in calls.items():
    try:
        call()
        said[name] = 'nothing'
    except SparseloraError as error:
        said[name] = str(error)
    except Exception as error:
        said[name] = f'RAW {type(error).__name__}: {error}'
print(json.dumps(said))
"""

# What the line says for some of them.
SAID = {
    'method name': 'expected an instance such as sl.Wanda()',
    'method class': 'expected an instance such as sl.Wanda()',
    'rules dict': "expected a list of pairs (regex, value) in order, such as [('.*/q/kernel', '2:4')",
    'rules text': 'expected a list of pairs',
    'lora number': 'expected sl.LoraSpec(rank=8, alpha=16)',
    'lora axes text': 'expected what sl.collect returned, or {path: sl.KernelAxes(layers, inputs, outputs)}',
    'masks as lora': 'expected the tree of sl.init_lora',
    'forward model': 'expected a function of (params, batch), such as model.hidden',
    'one batch': 'expected a list of batches, such as [batch]',
    'collect weights': "expected the name of an entry of each batch, such as 'attention_mask'",
    'generate tuple': 'expected model, params = sl.load_model(...)',
}


def test_wrong_objects_end_in_one_line_that_shows_the_right_call(tmp_path):
    done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    wrong = {name: line for name, line in said.items() if line == 'nothing' or line.startswith('RAW') or '\n' in line}
    assert not wrong
    for name, words in SAID.items():
        assert words in said[name], said[name]
