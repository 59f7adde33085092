"""What benchmarks/kernels.py prints: a table of times, on a chip, or two of estimates."""

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
from absl import flags
from kernels_gpu import on_gpus
from kernels_timed import timed
from kernels_tpu import on_tpus

ROWS = flags.DEFINE_list('rows', ['1', '16', '64', '256'], 'rows of x')
SHAPES = flags.DEFINE_list('shapes', ['4096x4096', '4096x11008'], 'inputs x outputs')
ROUNDS = flags.DEFINE_integer('rounds', 15, 'timed calls of each product, on a chip')


FIRST = 'chip', 'rows', 'weights'
TILE = 'KB an output tile (of dense)'
TERMS = 'bytes of bf16', 'bytes, us', 'matmul, us', 'vector, us', 'binds', 'packed / dense'
OF_XLA = 'XLA says, us', 'HBM, MB', 'VMEM, MB', 'spilled, MB'
BUILT = 'registers', 'spilled, B', 'shared, B', 'tensor core', 'instructions an element', TILE


def tables():
    """(columns, what prints a shape's rows) of each table."""
    if jax.default_backend() != 'cpu':
        print('Timed, in turn, on the chip.')
        columns = *FIRST, 'product', 'kernel', 'error', 'us, median', 'min to max', 'packed / dense', 'min to max'
        return [(columns, functools.partial(timed, rounds=ROUNDS.value))]
    print('Static estimates: nothing was run on a chip.')
    of_gpus = *FIRST, 'product', 'kernel', *BUILT, *TERMS, 'packed / (unpack, then dense)'
    return [(of_gpus, on_gpus), ((*FIRST, 'kernel', TILE, *TERMS, *OF_XLA), on_tpus)]


def main(argv):
    """Print the tables."""
    del argv
    for columns, table in tables():
        print('\n| ' + ' | '.join(columns) + ' |\n' + '|---' * len(columns) + '|')
        for rows in map(int, ROWS.value):
            for shape in SHAPES.value:
                table(rows, *map(int, shape.split('x')))
