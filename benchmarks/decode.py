"""Greedy decoding with packed 2:4 weights, against dense ones.

    python benchmarks/decode.py [--batches=1,8] [--dtypes=float32,bfloat16] [--rounds=9]
    python benchmarks/decode.py --size=llama-7b --dtypes=bfloat16 --formats=packed24,packed24_int4  # on a GPU

A random model of SmolLM2-135M's or LLaMA-7B's size, pruned 2:4, `--new` tokens a prompt of 8. Every round times each
format in turn, after calls that are not timed. A ratio is the median (min to max) over rounds of a format's time over
dense's of the same round. `of 16 bits` is the bytes of the kernels that are pruned, over those of dense bf16 ones;
`temporary` is what the compiled program takes beside its arguments (XLA's own count).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from absl import app, flags
from timing import in_turn

import sparselora_jax as sl
from sparselora_jax.evaluation import decode, search
from sparselora_jax.models.init import init_params
from sparselora_jax.models.model import Generation, Model, from_hf

BATCHES = flags.DEFINE_list('batches', ['1', '8'], 'prompts decoded together')
DTYPES = flags.DEFINE_list('dtypes', ['float32', 'bfloat16'], 'of weights and activations')
FORMATS = flags.DEFINE_list('formats', ['packed24', 'packed24_int4', 'bitmask'], 'what is timed against dense')
ROUNDS = flags.DEFINE_integer('rounds', 9, 'timed calls of each format')
LAYERS = flags.DEFINE_integer('layers', None, 'blocks of the model; all by default')
NEW = flags.DEFINE_integer('new', 32, 'tokens generated')
PROMPT = 8
SIZES = {
    'smollm2-135m': transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    'llama-7b': transformers.LlamaConfig(),
}
SIZE = flags.DEFINE_enum('size', 'smollm2-135m', SIZES, 'of the model')


def pruned(model: Model, dtype: str) -> tuple[dict, dict]:
    """Random params, 2:4 in all linears of the blocks, and the masks."""
    params = init_params(jax.random.key(0), model.shapes(), dtype=jnp.dtype(dtype))
    blocks = params['language']['blocks']
    kernels = {part: blocks[part] for part in ('attn', 'mlp')}
    masks = jax.tree.map(lambda kernel: sl.mask_from_scores(jnp.abs(kernel), '2:4'), kernels)
    kernels = jax.tree.map(lambda kernel, mask: jnp.where(mask, kernel, 0), kernels, masks)
    params['language']['blocks'] = blocks | kernels
    return params, {'language': {'blocks': masks}}


def held(params: dict) -> tuple[int, int]:
    """Bytes of the blocks' linears, and of the same in dense bf16."""
    blocks = params['language']['blocks']
    kernels = [blocks[part][name]['kernel'] for part in ('attn', 'mlp') for name in blocks[part]]
    return sum(kernel.nbytes for kernel in kernels), sum(2 * int(np.prod(kernel.shape)) for kernel in kernels)


def measure(model: Model, dtype: str, batch: int) -> None:
    """Print one line a format."""
    dense, masks = pruned(model, dtype)
    formats = {'dense': dense} | {name: sl.pack(dense, masks, name) for name in FORMATS.value}
    ids = np.random.default_rng(0).integers(1, SIZES[SIZE.value].vocab_size, (batch, PROMPT)).astype(np.int32)
    inputs = {'input_ids': ids, 'attention_mask': np.ones_like(ids)}
    settings = search.make_settings(
        NEW.value, length_penalty=1.0, early_stopping=False, min_new=NEW.value, eos=(0,), pad=1
    )
    programs = {
        name: decode.decode.lower(model, params, inputs, settings, beams=1).compile()
        for name, params in formats.items()
    }
    runs = {
        name: lambda name=name: jax.block_until_ready(programs[name](formats[name], inputs, settings))
        for name in formats
    }
    times = in_turn(runs, ROUNDS.value)
    for name, taken in times.items():
        bytes_held, of_bf16 = held(formats[name])
        token = 1e3 * np.array(taken) / NEW.value
        ratios = np.array(taken) / np.array(times['dense'])
        temporary = programs[name].memory_analysis().temp_size_in_bytes
        print(
            f'| {dtype} | {batch} | {name} | {min(token):.2f} | {np.median(token):.2f} | '
            f'{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}) | {bytes_held / 1e6:.1f} | '
            f'{bytes_held / of_bf16:.4f} | {temporary / 1e6:.1f} |',
            flush=True,
        )


def main(argv):
    """Print the table."""
    del argv
    config = SIZES[SIZE.value]
    config.num_hidden_layers = LAYERS.value or config.num_hidden_layers
    model = Model(from_hf(config), Generation(eos=(0,), pad=1))
    measured = 'ms a token, fastest', 'median', '/ dense', 'MB held', 'of 16 bits', 'temporary, MB'
    head = 'dtype', 'batch', 'weights', *measured
    print('| ' + ' | '.join(head) + ' |\n' + '|---' * len(head) + '|')
    for dtype in DTYPES.value:
        for batch in BATCHES.value:
            measure(model, dtype, int(batch))


if __name__ == '__main__':
    app.run(main)
