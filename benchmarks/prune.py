"""What pruning costs: Wanda, SparseGPT and ADMM, 2:4 and 50 %, over SmolLM2-135M, and the first two by llm-compressor.

    python benchmarks/prune.py [--llmcompressor=/path/to/its/venv/bin/python]
    python benchmarks/prune.py --passes=4 [--method=admm --text=FILE --score=FILE --rate=RATE --batch=SAMPLES]

Both prune SmolLM2's weights in fp32 (llm-compressor reads the Hugging Face directory that we wrote of them) on
the same tokens: 128 sequences of 128 from the topics of Python's own help (`pydoc_data`, PSF licence). Every run is a
process of its own. The clock runs from the model and the tokens in memory to the pruned weights in memory, compilation
included; both write over the weights that they read. Ours prunes in one pass (`by kernel`), and in the order of the
sources' code, where each block runs twice (`by layer`). `cpu` is the seconds of all threads: it says what a run took on
a machine that other work shared. Peak memory is what was resident at most in that time, `above` is that over what was
resident when it began (llm-compressor's weights are mapped files until they are touched: compare the peaks). Then both
results are written as Hugging Face directories and read by our code: zeros of the blocks' kernels (`broken`: N:M groups
with too few), and perplexity on `sparselora_jax/evaluation/heldout.txt` (public domain).

With `--passes`, only one method at 2:4 runs, without and with block-wise reconstruction. `--text` calibrates on another
text, with sequences spread evenly over it, `--score` also measures perplexity on the first 2,048 tokens of one.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from memory import PeakMemory

METHODS = ('wanda', 'sparsegpt', 'admm')
CASES = [(method, pattern) for method in METHODS for pattern in ('2:4', '0.5')]
GOALS = {'wanda': 5.0, 'sparsegpt': 3.0}  # llm-compressor has no ADMM
CHUNK = 8  # sequences a forward, of both
BLOCK, DAMP = 128, 0.01
SCORED = 2048  # tokens of another text
THREADS = len(os.sched_getaffinity(0))
NUMBERS = f'{"seconds":>8} {"cpu":>6} {"MiB":>6} {"above":>6} {"perplexity":>10} density'


def smollm2() -> tuple[Any, dict]:
    """The model and its params, fp32."""
    from sparselora_jax.checkpoints import embedded, gguf
    from sparselora_jax.models import causal
    from sparselora_jax.models.model import Model

    cfg, language = gguf.load_llama(embedded.language_model_file())
    return Model(causal.CausalConfig(cfg), embedded.GENERATION), {'language': language}


def write_model(folder: Path, model: Any, params: dict) -> None:
    """SmolLM2 as a Hugging Face directory."""
    from sparselora_jax.checkpoints import embedded, gguf, hf_configs
    from sparselora_jax.checkpoints.write_new import write_new

    config = hf_configs.llama_config(model.cfg.language, model.generation)
    tokenizer = gguf.load_tokenizer(embedded.language_model_file())
    write_new(folder, config, model, params, processor=tokenizer)


def write_tokens(file: Path, sequences: int, length: int, text: Path | None = None) -> None:
    """Calibration tokens: sequences spread evenly over a text, or the first ones of the topics of Python's help."""
    from pydoc_data.topics import topics

    from sparselora_jax.checkpoints import embedded, gguf

    tokenizer = gguf.load_tokenizer(embedded.language_model_file())
    words = text.read_text() if text else '\n\n'.join(topics[name] for name in sorted(topics))
    tokens = np.asarray(tokenizer(words)['input_ids'], np.int32)
    if tokens.size < sequences * length:
        raise SystemExit(f'{sequences} sequences of {length}: the text has only {tokens.size} tokens')
    windows = tokens[: tokens.size // length * length].reshape(-1, length)
    # The start of a text may be about one subject only.
    chosen = np.linspace(0, len(windows) - 1, sequences).astype(int) if text else np.arange(sequences)
    np.save(file, windows[chosen])


def prune_ours(
    tokens: Path, method: str, pattern: str, sequential: str, out: Path, reconstruct: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Prune once, in this process, and writes the directory `out`; `reconstruct` has options of `sl.Reconstruct`.

    Returns:
      `seconds`, `cpu` (seconds of all threads), `peak` and `loaded` in bytes, `compiled` (programs) and `compiling`
      (seconds, part of the others).
    """
    import jax

    import sparselora_jax as sl
    from sparselora_jax.sparse import rules

    compiling = []

    def count(event: str, seconds: float, **_) -> None:
        if event == '/jax/core/compile/backend_compile_duration':
            compiling.append(seconds)

    model, params = smollm2()
    flat = {path: np.array(leaf) if '/blocks/' in path else leaf for path, leaf in rules.flatten(params).items()}
    params = rules.unflatten(flat)

    def keep(path: str, layer: int, kernel: jax.Array, mask: jax.Array) -> None:
        flat[path][layer] = kernel

    ids = jax.device_put(np.load(tokens))
    batch = {'input_ids': ids, 'attention_mask': jax.numpy.ones_like(ids)}
    methods = {'wanda': sl.Wanda(), 'sparsegpt': sl.SparseGPT(block=BLOCK, damp=DAMP), 'admm': sl.ADMM()}
    rules_of_blocks = [('language/blocks/.*', pattern), ('.*', 'dense')]
    jax.monitoring.register_event_duration_secs_listener(count)
    memory, started, cpu = PeakMemory(), time.monotonic(), time.process_time()
    options = sl.Reconstruct(**reconstruct) if reconstruct else None
    sl.prune(
        model.hidden,
        params,
        [batch],
        rules_of_blocks,
        method=methods[method],
        sequential=sequential,
        chunk=CHUNK,
        reconstruct=options,
        keep=keep,
    )
    figures = {'seconds': time.monotonic() - started, 'cpu': time.process_time() - cpu}
    figures |= {'peak': memory.peak(), 'loaded': memory.loaded}
    write_model(out, model, params)
    return figures | {'compiled': len(compiling), 'compiling': sum(compiling)}


def check(folder: Path, pattern: str, text: Path | None = None) -> dict[str, Any]:
    """Perplexity on held-out text and on the start of another one, density of the blocks' kernels, and broken groups.

    A group of M weights is broken if it has fewer zeros than N:M promises.
    """
    import sparselora_jax as sl
    from sparselora_jax.checkpoints import embedded, gguf
    from sparselora_jax.evaluation.perplexity import held_out_text, perplexity
    from sparselora_jax.sparse import rules

    model, params = sl.load_model(folder, dtype='float32')
    tokenizer = gguf.load_tokenizer(embedded.language_model_file())

    def perplexity_on(words: str, length: int | None = None) -> float:
        tokens = np.asarray(tokenizer(words)['input_ids'])[:length]
        return perplexity(params['language'], model.cfg.language, tokens)

    found = {path: np.asarray(leaf) for path, leaf in rules.kernels(params).items() if '/blocks/' in path}
    kept, wanted = sum(np.count_nonzero(leaf) for leaf in found.values()), sl.parse_pattern(pattern)
    broken = None
    if wanted.structured:
        groups = (leaf.reshape(len(leaf), -1, wanted.m, leaf.shape[-1]) for leaf in found.values())
        broken = sum(int(np.sum(np.count_nonzero(group, axis=2) > wanted.n)) for group in groups)
    return {
        'perplexity': perplexity_on(held_out_text()),
        'of_text': perplexity_on(text.read_text(), SCORED) if text else None,
        'density': kept / sum(leaf.size for leaf in found.values()),
        'broken': broken,
    }


def _apart(function: Any, *args: Any) -> Any:
    """A call in a process of its own."""
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(function, args)


def _measure(
    tokens: Path,
    method: str,
    pattern: str,
    sequential: str = 'kernel',
    reconstruct: dict[str, Any] | None = None,
    text: Path | None = None,
) -> dict[str, Any]:
    """Prune by our code, check the result and print its row."""
    with tempfile.TemporaryDirectory() as out:
        ours = _apart(prune_ours, tokens, method, pattern, sequential, Path(out), reconstruct)
        ours |= _apart(check, Path(out), pattern, text)
    compiled = f'; compiled {ours["compiled"]} programs in {ours["compiling"]:.1f} s'
    by = f'ours, {reconstruct["passes"]} passes' if reconstruct else f'ours, by {sequential}'
    print(_row(method, pattern, by, ours) + compiled, flush=True)
    return ours


def _row(method: str, pattern: str, by: str, got: dict[str, Any]) -> str:
    peak, above = (size / 2**20 for size in (got['peak'], got['peak'] - got['loaded']))
    broken = '' if got['broken'] is None else f', {got["broken"]} broken'
    figures = f'{got["seconds"]:8.1f} {got["cpu"]:6.0f} {peak:6.0f} {above:6.0f} {got["perplexity"]:10.1f}'
    of_text = '' if got['of_text'] is None else f', {got["of_text"]:.1f} on the other text'
    return f'{method:10} {pattern:7} {by:22} {figures} {got["density"]:.6f}{broken}{of_text}'


def main() -> None:
    """Print a row a run, and the ratio of each pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sequences', type=int, default=128)
    parser.add_argument('--length', type=int, default=128)
    parser.add_argument('--text', type=Path, help='a text to calibrate on')
    parser.add_argument('--score', type=Path, help='another text to measure perplexity on')
    parser.add_argument('--method', choices=METHODS, default='wanda', help='that reconstruction follows')
    parser.add_argument('--passes', type=int, help='of reconstruction')
    parser.add_argument('--rate', type=float, help='of reconstruction')
    parser.add_argument('--batch', type=int, help='of reconstruction')
    parser.add_argument('--target', help='of reconstruction: dense or pruned')
    parser.add_argument('--llmcompressor', help='the Python of an environment that has llm-compressor')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, tokens = Path(folder) / 'model', Path(folder) / 'tokens.npy'
        write_model(model, *smollm2())
        write_tokens(tokens, arguments.sequences, arguments.length, arguments.text)
        print(f'{arguments.sequences} sequences of {arguments.length} tokens, {THREADS} threads, fp32')
        dense = _apart(check, model, 'dense', arguments.score)
        of_text = f', {dense["of_text"]:.1f} on the other text' if arguments.score else ''
        print(f'dense model: perplexity {dense["perplexity"]:.1f}{of_text}')
        print(f'{"method":10} {"pattern":7} {"by":22} {NUMBERS}', flush=True)
        if arguments.passes:
            given = {name: getattr(arguments, name) for name in ('passes', 'rate', 'batch', 'target')}
            # An option that is not given has the default of the library.
            options = {name: value for name, value in given.items() if value is not None}
            print(f'reconstruction: {options}')
            _measure(tokens, arguments.method, '2:4', text=arguments.score)
            _measure(tokens, arguments.method, '2:4', reconstruct=options, text=arguments.score)
            return
        for method, pattern in CASES:
            ours = _measure(tokens, method, pattern)
            before = _measure(tokens, method, pattern, 'layer')
            print(
                f'{method:10} {pattern:7} {before["cpu"] / ours["cpu"]:.2f}x fewer CPU seconds in one pass', flush=True
            )
            if not arguments.llmcompressor or method not in GOALS:
                continue
            with tempfile.TemporaryDirectory() as out:
                knobs = {'model': model, 'tokens': tokens, 'method': method, 'pattern': pattern, 'out': out}
                knobs |= {'block': BLOCK, 'damp': DAMP, 'batch': CHUNK, 'threads': THREADS}
                script = Path(__file__).with_name('prune_llmcompressor.py')
                command = [arguments.llmcompressor, script, *(f'--{name}={value}' for name, value in knobs.items())]
                log = Path(folder) / 'log.txt'
                with log.open('w') as file:
                    code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
                if code:
                    raise SystemExit(f'{script.name} ended with status {code}:\n{log.read_text()[-2000:]}')
                theirs = json.loads((Path(out) / 'figures.json').read_text())
                theirs |= _apart(check, Path(out), pattern)
            ratio, goal = theirs['seconds'] / ours['seconds'], GOALS[method]
            print(_row(method, pattern, f'llm-compressor {theirs["versions"]["llmcompressor"]}', theirs))
            print(f'{method:10} {pattern:7} {ratio:.2f}x faster, goal {goal:g}x', flush=True)


if __name__ == '__main__':
    main()
