"""What reading a Hugging Face directory costs: a LLaMA of 1.55e9 parameters, 3.1 GB of bfloat16 in four shards.

python benchmarks/load.py [--folder=/big/disk] [--cold]

The checkpoint is made up and deleted afterwards. `load` is `checkpoints.load.load_model` in a process of its own,
compilation included; `read` is reading the same bytes into one buffer that is used again. `staging` is the
peak memory of that process beyond what it had before and beyond the params themselves: what the host held on the way.

Two cores: `read` 0.3 s from the kernel's cache, `load` 7.7 s with nothing else running (15 to 17 s beside other jobs).
About one second is compilation and one the zeroing of 3.1 GB of new memory, which a plain read into one buffer never
pays. Staging: 404 to 509 MiB, where one layer and 0.5 GiB are 609 MiB.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

WIDTH, MLP, LAYERS, VOCAB, SHARDS = 2048, 5504, 28, 32000, 4


def tensors() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint, in the order of its layers."""
    shapes = {'model.embed_tokens.weight': (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        root = f'model.layers.{layer}'
        shapes |= {f'{root}.self_attn.{name}_proj.weight': (WIDTH, WIDTH) for name in 'qkvo'}
        shapes |= {f'{root}.mlp.{name}_proj.weight': (MLP, WIDTH) for name in ('gate', 'up')}
        shapes[f'{root}.mlp.down_proj.weight'] = (WIDTH, MLP)
        shapes |= {f'{root}.{name}_layernorm.weight': (WIDTH,) for name in ('input', 'post_attention')}
    return shapes | {'model.norm.weight': (WIDTH,), 'lm_head.weight': (VOCAB, WIDTH)}


def write(folder: Path) -> int:
    """Write the directory; the numbers repeat, which is cheap and costs a reader the same.

    Returns:
      bytes of all tensors.
    """
    import ml_dtypes
    import numpy as np
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
    ).save_pretrained(folder)
    block = np.random.default_rng(0).normal(0, 0.02, 2**23).astype(ml_dtypes.bfloat16).tobytes()
    items, index, total = list(tensors().items()), {}, 0
    for shard in range(SHARDS):
        name = f'model-{shard + 1:05}-of-{SHARDS:05}.safetensors'
        header, end = {}, 0
        for tensor, shape in items[shard * len(items) // SHARDS : (shard + 1) * len(items) // SHARDS]:
            size = 2 * int(np.prod(shape))
            header[tensor] = {'dtype': 'BF16', 'shape': shape, 'data_offsets': [end, end + size]}
            end += size
            index[tensor] = name
        text = json.dumps({'__metadata__': {'format': 'pt'}} | header).encode()
        with (folder / name).open('wb') as file:
            file.write(len(text).to_bytes(8, 'little') + text)
            for start in range(0, end, len(block)):
                file.write(block[: end - start])
            os.fsync(file.fileno())
        total += end
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
    return total


def _evict(folder: Path) -> None:
    """Drop the files from the kernel's cache."""
    for path in folder.glob('*.safetensors'):
        with path.open('rb') as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(folder: Path) -> float:
    """Seconds of a plain read."""
    buffer, start = bytearray(2**26), time.perf_counter()
    for path in sorted(folder.glob('*.safetensors')):
        with path.open('rb', buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def measure(folder: Path, cold: bool) -> dict[str, float]:
    """Load once, in this process.

    Returns:
      `load` in seconds; `staging` and `params` in bytes.
    """
    import jax
    import jax.numpy as jnp
    import transformers

    from sparselora_jax.checkpoints.load import load_model
    from sparselora_jax.runtime.progress import peak_memory

    assert transformers.AutoConfig  # imported, with all it takes, before memory is looked at
    jnp.zeros(()).block_until_ready()
    if cold:
        _evict(folder)
    before = peak_memory()
    start = time.perf_counter()
    _, params = load_model(folder)
    load = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {'load': load, 'params': size, 'staging': peak_memory() - before - size}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--folder', default=None, help='where the checkpoint is made; the temporary directory by default'
    )
    parser.add_argument('--cold', action='store_true', help='drop the files from the cache before each reading')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write(folder)
        if arguments.cold:
            _evict(folder)
        read = _read(folder)  # here: its buffer is no memory of the loading process
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            got = pool.apply(measure, (folder, arguments.cold)) | {'read': read}
    layer = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP + 2 * WIDTH)
    print(f'params  {got["params"] / 1e9:6.2f} GB')
    print(f'read    {got["read"]:6.2f} s')
    print(f'load    {got["load"]:6.2f} s, {got["load"] / got["read"]:.2f} of read')
    print(f'staging {got["staging"] / 2**20:6.0f} MiB; one layer and 0.5 GiB: {(layer + 2**29) / 2**20:.0f} MiB')


if __name__ == '__main__':
    main()
