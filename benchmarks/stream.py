"""Pruning a model that memory does not hold: `launch/prune.py --config.stream=True` under an enforced limit.

    python benchmarks/stream.py [--limit=3.0] [--method=sparsegpt]

Makes up a BLIP-2 directory with a LLaMA of 1.1e9 parameters (4.5 GB in float32), then prunes its language tower at 2:4
twice, in processes of their own: from memory, and block by block from disk. A process whose resident memory (VmRSS,
which counts code and mapped files too) passes the limit is killed. What was pruned is read back: every group of four
holds two zeros. The directory is deleted afterwards.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import app, flags

ROOT = Path(__file__).parents[1]
LIMIT = flags.DEFINE_float('limit', 3.0, 'GiB of resident memory')
METHOD = flags.DEFINE_string('method', 'wanda', 'a pruner that streams statistics')
SAMPLES = flags.DEFINE_integer('samples', 32, 'calibration questions')
MAKE = flags.DEFINE_string('make', '', 'internal: write the checkpoint there')


def make(folder: str) -> None:
    """Write the directory; its numbers repeat, which is cheap and costs a reader the same."""
    import jax.numpy as jnp
    import numpy as np

    from sparselora_jax.checkpoints import embedded
    from sparselora_jax.models import blip2, llama, qformer, vit
    from sparselora_jax.models.model import Model
    from sparselora_jax.sparse import rules

    cfg = blip2.Blip2Config(
        vision=vit.ViTConfig(image_size=64, patch_size=16, width=64, depth=2, heads=2, mlp_width=128),
        qformer=qformer.QFormerConfig(queries=8, width=64, pairs=1, heads=2, mlp_width=128, image_width=64),
        language=llama.LlamaConfig(vocab=49152, width=2048, depth=20, heads=16, kv_heads=16, mlp_width=5632),
    )
    model, noise = Model(cfg, embedded.GENERATION), np.random.default_rng(0).normal(0, 0.02, 2**24).astype(np.float32)

    def leaf(path, shape):
        if path.endswith('scale'):
            return jnp.ones(shape)
        return jnp.asarray(np.resize(noise, int(np.prod(shape))).reshape(shape))

    flat = {path: leaf(path, shape) for path, shape in rules.flatten(model.shapes()).items()}
    embedded.save(folder, model, rules.unflatten(flat))


def resident(pid: int) -> float:
    """GiB of a process, 0 once it has ended."""
    try:
        lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    except FileNotFoundError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith('VmRSS')) / 2**20


def prune(folder: str, workdir: Path, stream: bool) -> tuple[bool, float, float]:
    """Run the script; (finished, peak GiB, seconds)."""
    command = [sys.executable, 'launch/prune.py', f'--config=configs/blip2_lang_only.py:model={folder}']
    fields = {'stream': stream, 'prune.method': METHOD.value, 'prune.samples': SAMPLES.value, 'prune.chunk': 8}
    command += [f'--config.{name}={value}' for name, value in fields.items()] + [f'--workdir={workdir}']
    started, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        if peak > LIMIT.value:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.005)
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f'{" ".join(command)} ended with {process.returncode}')
    return process.returncode == 0, peak, time.monotonic() - started


def check(folder: Path) -> int:
    """Count the zeros of every pruned kernel of an exported directory; returns how many kernels there are."""
    import numpy as np

    from sparselora_jax.checkpoints import checkpoint_files, safetensors_format

    kernels = 0
    for entry in checkpoint_files.open_checkpoint(folder).entries.values():
        if '.layers.' in entry.name and 'language_model' in entry.name and len(entry.shape) == 2:
            groups = safetensors_format.read(entry).reshape(entry.shape[0], -1, 4)  # [out, in] there
            assert (np.count_nonzero(groups, axis=2) == 2).all(), entry.name
            kernels += 1
    assert kernels, f'{folder}: no kernel found'
    return kernels


def main(argv):
    """Make the checkpoint, prunes it in both ways, prints what happened."""
    del argv
    if MAKE.value:
        make(MAKE.value)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, root = f'{temporary}/model', Path(temporary)
        subprocess.run([sys.executable, __file__, f'--make={folder}'], check=True)
        size = sum(file.stat().st_size for file in Path(folder).glob('*.safetensors')) / 2**30
        print(f'weights {size:.2f} GiB, limit {LIMIT.value} GiB, {METHOD.value} 2:4, {SAMPLES.value} questions')
        for stream in (False, True):
            finished, peak, seconds = prune(folder, root / f'run_{stream}', stream)
            how = 'from disk' if stream else 'in memory'
            what = f'pruned in {seconds:.0f} s' if finished else f'killed after {seconds:.0f} s'
            print(f'{how}: {what}, peak {peak:.2f} GiB', flush=True)
        print(f'read back: {check(root / "run_True" / "pruned")} kernels, each group of four with two zeros')


if __name__ == '__main__':
    app.run(main)
