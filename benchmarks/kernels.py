"""x @ packed 2:4 weights against x @ dense ones: timed where there is a GPU or TPU, else compiled for them, not run.

  pip install -r requirements.txt -r benchmarks/requirements-kernels.txt   # in an environment of its own
  python benchmarks/kernels.py [--rows=1,16,64] [--shapes=4096x4096,4096x11008]

On a chip: numbers are checked, then all are timed in turn (`kernels_timed.py`). Without one the programs are compiled
for several (`kernels_gpu.py`, `kernels_tpu.py`), and their time is estimated as the largest of three terms:

- bytes: what is read and written once, over the memory's rate;
- matmul: FLOPs, zeros included (the weights are unpacked before they are multiplied; on TPUs twice as many for the
  transposed product of int4), over the rate of bf16;
- vector: of GPUs the instructions in the kernel's loop (counted in the SASS), a warp's worth each, over the four that a
  multiprocessor issues a cycle; of TPUs the bundles of the kernel's schedule, one a cycle.

A GPU's kernel is cut into programs: its matmul and vector terms are those of the multiprocessor that has most of them.
The dense product has bytes and FLOPs at full rate on all of them and no vector term, alike for `x @ W` and `g @ W.T`.
The dense TPU program is XLA's own. What XLA itself says of a TPU program (`optimal_seconds`) is no bound: several times
the bytes' time for a dense product, and negative for some programs with a Pallas kernel, then left out.
"""

import functools
import glob
import os
import sys
from pathlib import Path

# Where there is no chip, nothing looks for one.
os.environ |= {
    name: value
    for name, value in {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'}.items()
    if not any(map(glob.glob, ('/dev/nvidia[0-9]*', '/dev/accel[0-9]*', '/dev/vfio/[0-9]*')))
}
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from absl import app, flags
from kernels_gpu import on_gpus
from kernels_timed import timed
from kernels_tpu import on_tpus

ROWS = flags.DEFINE_list('rows', ['1', '16', '64', '256'], 'rows of x')
SHAPES = flags.DEFINE_list('shapes', ['4096x4096', '4096x11008'], 'inputs x outputs')
ROUNDS = flags.DEFINE_integer('rounds', 15, 'timed calls of each product, on a chip')


FIRST = 'chip', 'rows', 'weights'
TERMS = 'bytes of bf16', 'bytes, us', 'matmul, us', 'vector, us', 'binds', 'packed / dense'
BUILT = 'registers', 'spilled, B', 'shared, B', 'tensor core', 'instructions an element'


def tables():
    """(columns, what prints a shape's rows) of each table."""
    if jax.default_backend() != 'cpu':
        print('Timed, in turn, on the chip.')
        columns = *FIRST, 'product', 'kernel', 'error', 'us, median', 'min to max', 'packed / dense', 'min to max'
        return [(columns, functools.partial(timed, rounds=ROUNDS.value))]
    print('Static estimates: nothing was run on a chip.')
    of_gpus = *FIRST, 'product', 'kernel', *BUILT, *TERMS, 'packed / (unpack, then dense)'
    return [(of_gpus, on_gpus), ((*FIRST, 'kernel', *TERMS, 'XLA says, us', 'HBM, MB'), on_tpus)]


def main(argv):
    """Prints the tables."""
    del argv
    for columns, table in tables():
        print('\n| ' + ' | '.join(columns) + ' |\n' + '|---' * len(columns) + '|')
        for rows in map(int, ROWS.value):
            for shape in SHAPES.value:
                table(rows, *map(int, shape.split('x')))


if __name__ == '__main__':
    app.run(main)
