"""Where `benchmarks/prune.py`'s time goes: the parts of pruning one block of SmolLM2-135M, times the number of blocks.

    python benchmarks/prune_split.py

Each part is called once before it is timed, so compilation is left out; a figure is the fastest of `--rounds`. FLOPs
are counted analytically (of the products; masks have none), and a share is of the better of the matmul rates printed,
taken in the same run.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from prune import BLOCK, CHUNK, DAMP
from timing import matmul_runs, seconds

import sparselora_jax as sl
from sparselora_jax.checkpoints import embedded, gguf
from sparselora_jax.models import layers, llama
from sparselora_jax.pruning import calibrate, sparsegpt, walk
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.masks import parse_pattern

SEQUENCES, LENGTH = 128, 128


def main() -> None:
    """Print a row a part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5)
    rounds = parser.parse_args().rounds

    def fastest(run: Callable[[], object]) -> float:
        jax.block_until_ready(run())
        return min(seconds(lambda: jax.block_until_ready(run())) for _ in range(rounds))

    shapes = [(2048, 2048, 2048), (CHUNK * LENGTH, 576, 1536)]
    rates = [flops / fastest(run) for run, flops in (matmul_runs(shape)['jax'] for shape in shapes)]
    print(', '.join(f'{rate / 1e9:.0f} GFLOP/s at {shape}' for rate, shape in zip(rates, shapes, strict=True)))

    cfg, language = gguf.load_llama(embedded.language_model_file())
    blocks = jax.tree.map(lambda leaf: leaf[0], language['blocks'])
    tokens = jax.random.randint(jax.random.key(0), (SEQUENCES, LENGTH), 0, cfg.vocab)
    valid = jnp.ones(tokens.shape, bool)
    x, ctx = llama.embed(language, cfg, llama.embed_tokens(language, cfg, tokens), layers.causal_view(valid))
    chunks = walk.in_chunks(x, ctx | {'valid': valid}, CHUNK)
    kernels = rules.kernels(blocks)
    patterns = {pattern: dict.fromkeys(kernels, parse_pattern(pattern)) for pattern in ('2:4', '0.5')}
    methods = {'wanda': sl.Wanda(), 'sparsegpt': sl.SparseGPT(block=BLOCK, damp=DAMP)}
    step = jax.jit(lambda w, x, ctx: llama.block(w, cfg, x, ctx, None)[0])
    observers = {
        name: calibrate.make_observer(
            lambda w, inputs: llama.block(w, cfg, *inputs, None),
            stats=lambda path, stat=method.statistic: stat if path in kernels else None,
        )
        for name, method in methods.items()
    }
    stats = {name: observe(blocks, chunks) for name, observe in observers.items()}
    invert = jax.jit(lambda h: sparsegpt.inverse_factor(h, DAMP))
    hessians = list({id(total): total for total, _ in stats['sparsegpt'].values()}.values())

    def prune(method: str, pattern: str) -> Callable[[], object]:
        flat = rules.flatten(blocks)
        zeros = {path: patterns[pattern][path].zeros(leaf.shape[0]) * leaf.shape[1] for path, leaf in kernels.items()}
        of_block = dict.fromkeys(kernels, methods[method])
        return lambda: kernels.prune_matrices(flat, stats[method], patterns[pattern], of_block, zeros)

    rows, width, kv = SEQUENCES * LENGTH, cfg.width, cfg.kv_heads * cfg.head_dim
    attention = 2 * 2 * rows * LENGTH * width
    captured = 2 * rows * width * (2 * width + 2 * kv + 2 * cfg.mlp_width) + attention
    gram = sum(2 * rows * h.shape[0] ** 2 for h in hessians)
    # A Cholesky factor and the inverse of a triangle take n^3 / 3 each.
    inverse = sum(2 * h.shape[0] ** 3 / 3 for h in hessians)
    updates = sum(leaf.shape[0] ** 2 * leaf.shape[1] for leaf in kernels.values())
    capture = {name: fastest(lambda name=name: observers[name](blocks, chunks)) for name in methods}
    inverting = fastest(lambda: [invert(h) for h in hessians])
    forward = captured + 2 * rows * width * cfg.mlp_width
    parts = [
        ('forward on', fastest(lambda: [step(blocks, *chunk) for chunk in chunks]), forward),
        ('capture, squares', capture['wanda'], captured),
        ('capture, Hessian: what is added', capture['sparsegpt'] - capture['wanda'], gram),
        ('inverse', inverting, inverse),
    ]
    for pattern in patterns:
        parts.append((f'Wanda {pattern}: masks', fastest(prune('wanda', pattern)), 0))
        parts.append((f'SparseGPT {pattern}: columns', fastest(prune('sparsegpt', pattern)) - inverting, updates))
    print(f'{"part, all " + str(cfg.depth) + " blocks":34} {"seconds":>8} {"GFLOP":>8} {"GFLOP/s":>8} {"share":>6}')
    for name, took, flops in parts:
        rate = f'{flops / took / 1e9:8.0f} {flops / took / max(rates):6.0%}' if flops else ''
        print(f'{name:34} {cfg.depth * took:8.2f} {cfg.depth * flops / 1e9:8.0f} {rate}')


if __name__ == '__main__':
    main()
