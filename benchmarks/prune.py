"""What pruning costs: Wanda and SparseGPT, 2:4 and 50 %, over SmolLM2-135M with 128 sequences of 128 tokens.

python benchmarks/prune.py

Each method runs in a process of its own, so that its peak memory is its own; compilation is included, as a user meets
it. `forwards` is the time over that of one forward pass of the same tokens in the same process: a sequential pruner
needs two (statistics in, pruned output on), and what is above two is the method. `above` is the peak memory over that
of the process with the model loaded; the hidden states of the calibration set are 38 MB of it.
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

CASES = [(method, pattern) for method in ('wanda', 'sparsegpt') for pattern in ('2:4', '0.5')]


def measure(method: str, pattern: str, sequences: int, length: int) -> dict[str, float]:
    """Prunes once, in this process.

    Returns:
      `seconds` of `sl.prune`, `forward` (seconds of one forward), `peak` and `above` in bytes, and `density`.
    """
    import jax
    import jax.numpy as jnp

    import sparselora_jax as sl
    from sparselora_jax.models import embedded, gguf, llama
    from sparselora_jax.progress import peak_memory

    cfg, language = gguf.load_llama(embedded.language_model_file())
    params = {'language': language}
    # Cost does not depend on what the tokens say.
    tokens = jax.random.randint(jax.random.key(0), (sequences, length), 0, cfg.vocab)
    batch = {'tokens': tokens, 'valid': jnp.ones(tokens.shape, bool)}

    def forward(w, batch, run=None):
        x = llama.embed_tokens(w['language'], cfg, batch['tokens'])
        return llama.forward(w['language'], cfg, x, batch['valid'], *([] if run is None else [run]))

    whole = jax.jit(lambda w, b: forward(w, b)[:, -1])
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 8], batch) for i in range(0, sequences, 8)]
    jax.block_until_ready(whole(params, parts[0]))
    loaded, started = peak_memory(), time.monotonic()
    for part in parts:
        jax.block_until_ready(whole(params, part))
    once, started = time.monotonic() - started, time.monotonic()
    chosen = sl.Wanda() if method == 'wanda' else sl.SparseGPT(block=64)
    rules = [('language/blocks/.*', pattern), ('.*', 'dense')]
    result = jax.block_until_ready(sl.prune(forward, params, [batch], rules, method=chosen))
    seconds, peak = time.monotonic() - started, peak_memory()
    density = sl.density(result.masks)['total']
    return {'seconds': seconds, 'forward': once, 'peak': peak, 'above': peak - loaded, 'density': density}


def main() -> None:
    """Prints a row a method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sequences', type=int, default=128)
    parser.add_argument('--length', type=int, default=128)
    arguments = parser.parse_args()
    print(
        f'{"method":10} {"pattern":8} {"seconds":>8} {"forwards":>9} {"peak GiB":>9} {"above GiB":>10} {"density":>8}'
    )
    for method, pattern in CASES:
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            got = pool.apply(measure, (method, pattern, arguments.sequences, arguments.length))
        print(
            f'{method:10} {pattern:8} {got["seconds"]:8.1f} {got["seconds"] / got["forward"]:9.1f} '
            f'{got["peak"] / 2**30:9.2f} {got["above"] / 2**30:10.2f} {got["density"]:8.4f}',
            flush=True,
        )


if __name__ == '__main__':
    main()
