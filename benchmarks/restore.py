"""A restoration step of a published model on this accelerator, on dense and on packed bases: bytes and seconds.

    python benchmarks/restore.py Salesforce/instructblip-vicuna-7b [--bases=dense,packed,packed_int4] [--steps=5]

Random weights of the model's shapes, its language tower 2:4, LoRA of the family's recipe on all towers, 8 samples in
micro-batches of one (`--batch`, `--accumulate`), blocks rematerialised. `dense+teacher` runs the teacher in the step,
as the paper does (it is the base, read without masks); the others read its 64 likeliest tokens, of random numbers too.
`arguments` and `temporary` are the compiler's count, `peak` is the most that the device's allocator held in the whole
process, `shapes` what `memory.py` says beforehand. Each base is measured in a process of its own.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from configs import instructblip_lang_only
from sparselora_jax import recipe
from sparselora_jax.models.init import init_params
from sparselora_jax.models.model import abstract_model
from sparselora_jax.planning import memory, programs, published
from sparselora_jax.restoration.losses import TopK
from sparselora_jax.restoration.restore import Frozen
from sparselora_jax.restoration.train import init_state
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.packing.packed24 import Packed24, mask24, shapes24
from sparselora_jax.sparse.weights import init_lora

CASES = {
    'dense+teacher': {'base': 'dense', 'teacher': 'model'},
    'dense': {'base': 'dense', 'teacher': 'top_k'},
    'packed': {'base': 'packed', 'teacher': 'top_k'},
    'packed_int4': {'base': 'packed_int4', 'teacher': 'top_k'},
}
BASES = flags.DEFINE_list('bases', list(CASES), 'what is measured')
BATCH = flags.DEFINE_integer('batch', 8, 'samples a step')
ACCUMULATE = flags.DEFINE_integer('accumulate', 8, 'micro-batches that they are cut into')
STEPS = flags.DEFINE_integer('steps', 5, 'timed steps')
CODES = np.array([first | second << 2 for second in range(4) for first in range(second)], np.uint8)  # two of four
WORDS = 40  # of a vocabulary, which are drawn from
COLUMNS = 'base', 'shapes', 'arguments', 'temporary', 'together, GiB', 'peak, GiB', 's a step, median', 'min to max'
GIB = 2**30


def random_positions(key: jax.Array, like: Any) -> jax.Array:
    """Of a packed kernel."""
    low, high = jax.random.choice(key, jnp.asarray(CODES), (2, *like.shape))
    return low | high << 4


def random_packed(key: jax.Array, like: Packed24) -> Packed24:
    """A packed kernel whose numbers are random."""
    spread = like.inputs**-0.5
    positions = random_positions(key, like.positions)
    if like.scale is None:
        values = spread * jax.random.normal(key, like.values.shape, like.values.dtype)
        return Packed24(values, positions, None, like.inputs)
    values = jax.random.bits(key, like.values.shape, jnp.uint8)
    return Packed24(values, positions, jnp.full(like.scale.shape, spread / 4, like.scale.dtype), like.inputs)


def random_params(key: jax.Array, like: dict) -> dict:
    """Params of shapes, packed or not, one leaf after the other."""

    def leaf(key, name, like):
        if isinstance(like, Packed24):
            return jax.jit(lambda key: random_packed(key, like))(key)
        shapes = {name: like.shape}
        return jax.jit(lambda key: init_params(key, shapes, dtype=like.dtype)[name])(key)

    flat = enumerate(rules.flatten(like).items())
    found = {path: leaf(jax.random.fold_in(key, i), path.split('/')[-1], like) for i, (path, like) in flat}
    return rules.unflatten(found)


def random_masks(key: jax.Array, like: dict) -> dict:
    """2:4 masks."""

    def mask(shape):
        positions = shapes24(jax.ShapeDtypeStruct(shape, jnp.bfloat16)).positions
        return jax.jit(lambda key: mask24(Packed24(None, random_positions(key, positions), None, shape[-2])))(key)

    return jax.tree.map(lambda leaf: mask(leaf.shape), like)


def random_batch(like: dict) -> dict:
    """Words are any but the first few, all of them valid; a teacher's, as likely as each other."""
    rng = np.random.default_rng(0)

    def array(path, leaf):
        if path == 'pixel_values':
            return rng.normal(size=leaf.shape).astype(leaf.dtype)
        if 'mask' in path or path == 'answer':
            return np.ones(leaf.shape, leaf.dtype)
        return rng.integers(10, WORDS, leaf.shape, leaf.dtype)

    found = {name: array(name, leaf) for name, leaf in like.items() if name != 'teacher'}
    if (teacher := like.get('teacher')) is not None:
        tokens = np.broadcast_to(np.arange(teacher.tokens.shape[-1], dtype=np.int32), teacher.tokens.shape)
        log_probs = np.full(teacher.log_probs.shape, -np.log(teacher.log_probs.shape[-1]), np.float32)
        found['teacher'] = TopK(tokens, log_probs)
    return found


def measure(name: str, case: str) -> None:
    """Prints one line."""
    cfg = published.model_config(published.find_config(name))
    config = instructblip_lang_only.get_config('hardware=gpu')
    size = {'batch': BATCH.value, 'accumulate': ACCUMULATE.value}
    config.restore.update(CASES[case] | size | {'remat': True})
    made = memory.recipe(cfg, config)
    step, tx = recipe.restore_program(abstract_model(cfg), config, None)
    _, (state_like, frozen_like, batch_like) = programs.restore_step(made)
    key = jax.random.key(0)
    params, masks = random_params(key, frozen_like.params), frozen_like.masks
    frozen = Frozen(params, None if masks is None else random_masks(key, masks), None)
    lora = jax.jit(lambda key: init_lora(key, made.params, recipe.lora_rules(config)))(key)
    state, batch = init_state(lora, tx), jax.device_put(random_batch(batch_like))
    del lora  # the state holds a copy
    assert jax.tree.structure(state) == jax.tree.structure(state_like)
    compiled = step.lower(state, frozen, batch).compile()
    seconds = []
    for _ in range(1 + STEPS.value):
        started = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        loss = float(metrics['loss'])
        seconds.append(time.perf_counter() - started)
    if not np.isfinite(loss):
        raise SystemExit(f'{case}: the loss is {loss}')
    count, held = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
    sizes = memory.restore(made).total, count.argument_size_in_bytes, count.temp_size_in_bytes
    fresh = count.output_size_in_bytes - count.alias_size_in_bytes
    cells = [case, *(f'{size / GIB:.2f}' for size in (*sizes, sizes[1] + sizes[2] + fresh))]
    cells += [f'{held["peak_bytes_in_use"] / GIB:.2f}' if held else '-', f'{np.median(seconds[1:]):.3f}']
    print('| ' + ' | '.join([*cells, f'{min(seconds[1:]):.3f} to {max(seconds[1:]):.3f}']) + ' |', flush=True)


def main(argv):
    """Prints the table, a process a base; in such a process, its line."""
    if len(argv) != 2 or set(BASES.value) - set(CASES):
        raise SystemExit(f'expected one model, not {argv[1:]}, and --bases of {", ".join(CASES)}, not {BASES.value}')
    if len(BASES.value) == 1:
        measure(argv[1], *BASES.value)
        return
    print('| ' + ' | '.join(COLUMNS) + ' |\n' + '|---' * len(COLUMNS) + '|', flush=True)
    for base in BASES.value:
        subprocess.run([*sys.orig_argv, f'--bases={base}'], check=True)


if __name__ == '__main__':
    app.run(main)
