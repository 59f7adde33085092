"""Where the time of `benchmarks/prune.py` goes: parts of pruning one block of SmolLM2-135M in one pass, times 30.

    python benchmarks/prune_split.py [--rounds=3]

Every case runs once before it is timed, so compilation is left out; a figure is that of the fastest of `--rounds`
rounds. Each part waits for its results, which a run without a stopwatch does not. The bound is what the products alone
would take, those of one forward and of the Hessians, at the better of the two matmul rates printed, taken in the same
run. FLOPs are counted from the programs (`planning.flops`). For comparison, the forward alone is timed too, where each
block is one program, neither cut nor observed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from prune import BLOCK, CHUNK, DAMP
from timing import matmul_runs, seconds

import sparselora_jax as sl
from sparselora_jax.checkpoints import embedded, gguf
from sparselora_jax.models import layers, llama
from sparselora_jax.planning.flops import matmul_flops
from sparselora_jax.pruning import calibrate, walk
from sparselora_jax.pruning.kernels import prune_targets
from sparselora_jax.pruning.one_pass import OnePass, Target
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.patterns import parse_pattern

SEQUENCES = 128
LENGTH = 128
METHODS = {'Wanda': sl.Wanda(), 'SparseGPT': sl.SparseGPT(block=BLOCK, damp=DAMP), 'ADMM': sl.ADMM()}


@dataclass
class TimedPass(OnePass):
    """A pass that measures its parts, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    def _run_segment(self, level: Any, segment: Any, chunk: Any) -> None:
        started = time.perf_counter()
        super()._run_segment(level, segment, chunk)
        jax.block_until_ready(list(chunk.values.values()))
        self._add('forward', time.perf_counter() - started)

    def _prune(self, *arguments: Any) -> None:
        started = time.perf_counter()
        before = self.seconds.get('masks and updates', 0.0)
        super()._prune(*arguments)
        took = time.perf_counter() - started
        # What is not the method's own time went into the statistics.
        self._add('statistics', took - (self.seconds['masks and updates'] - before))

    def _add(self, part: str, took: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + took


def _rate(run: Callable[[], Any], flops: float, rounds: int) -> float:
    """Return the operations per second of the fastest of some rounds; the first one is not timed."""
    jax.block_until_ready(run())
    return flops / min(seconds(lambda: jax.block_until_ready(run())) for _ in range(rounds))


def main() -> None:
    """Print a row a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=3)
    rounds = parser.parse_args().rounds

    shapes = [(2048, 2048, 2048), (CHUNK * LENGTH, 576, 1536)]
    rates = []
    for shape in shapes:
        # llm-compressor multiplies by torch.
        rate = {name: _rate(*run, rounds) for name, run in matmul_runs(shape).items()}
        rates.append(rate['jax'])
        print(f'{shape}: ' + ', '.join(f'{name} {value / 1e9:.0f} GFLOP/s' for name, value in rate.items()))

    cfg, language = gguf.load_llama(embedded.language_model_file())
    w = rules.flatten(jax.tree.map(lambda leaf: leaf[0], language['blocks']))
    kernels = rules.kernels(rules.unflatten(w))
    tokens = jax.random.randint(jax.random.key(0), (SEQUENCES, LENGTH), 0, cfg.vocab)
    valid = jnp.ones(tokens.shape, bool)
    x, ctx = llama.embed(language, cfg, llama.embed_tokens(language, cfg, tokens), layers.causal_view(valid))
    chunks = walk.in_chunks(x, ctx | {'valid': valid}, CHUNK)

    def block(w, x, ctx, cache):
        return llama.block(w, cfg, x, ctx, cache)

    forward = len(chunks) * matmul_flops(lambda w, chunk: block(w, *chunk, None), rules.unflatten(w), chunks[0])
    uncut = jax.jit(lambda w, chunk: block(w, *chunk, None)[0])

    def run_uncut():
        for chunk in chunks:
            jax.block_until_ready(uncut(rules.unflatten(w), chunk))

    run_uncut()
    alone = min(seconds(run_uncut) for _ in range(rounds))
    share = forward / max(rates) / alone
    print(f'forward alone, uncut: {cfg.depth * alone:.2f} s, the bound of its products is {share:.0%} of that')
    # q, k and v read one array, and so do gate and up.
    inputs = [w[name].shape[0] for name in ('attn/q/kernel', 'attn/o/kernel', 'mlp/up/kernel', 'mlp/down/kernel')]
    rows = SEQUENCES * LENGTH
    hessians = sum(matmul_flops(calibrate.hessian, jax.ShapeDtypeStruct((rows, n), jnp.float32)) for n in inputs)

    def split(method: sl.pruning.Method, pattern: str) -> dict[str, float]:
        passes = TimedPass(dict.fromkeys(kernels, method).__getitem__)
        patterns = dict.fromkeys(kernels, parse_pattern(pattern))

        def prune(targets: Mapping[str, Target]) -> dict[str, jax.Array]:
            started = time.perf_counter()
            zeros = {name: patterns[target.path].zeros(target.kernel.size) for name, target in targets.items()}
            pruned, _ = prune_targets(targets, patterns, dict.fromkeys(kernels, method), zeros)
            jax.block_until_ready(pruned)
            passes._add('masks and updates', time.perf_counter() - started)
            return pruned

        passes.prune = prune
        blocks = walk.BlockPass(block, {name: name for name in kernels}, None)
        runs = []
        for _ in range(rounds + 1):
            passes.seconds = {}
            started = time.perf_counter()
            jax.block_until_ready(list(blocks.run(0, w, chunks, passes)))
            runs.append(passes.seconds | {'whole': time.perf_counter() - started})
        return min(runs[1:], key=lambda run: run['whole'])

    parts = ('forward', 'statistics', 'masks and updates', 'whole')
    print(f'{"seconds, all " + str(cfg.depth) + " blocks":22}' + ''.join(f'{part:>19}' for part in (*parts, 'bound')))
    for name, method in METHODS.items():
        bound = (forward + (hessians if method.statistic is calibrate.hessian else 0)) / max(rates)
        for pattern in ('2:4', '0.5'):
            took = split(method, pattern)
            row = ''.join(f'{cfg.depth * took[part]:19.2f}' for part in parts)
            print(f'{name + " " + pattern:22}{row}{cfg.depth * bound:19.2f} ({bound / took["whole"]:.0%})', flush=True)


if __name__ == '__main__':
    main()
