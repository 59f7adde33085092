"""Tiles of the packed GPU kernels: compiles candidates for every GPU and writes the best to kernels/gpu_tiles.py.

  python benchmarks/tune.py    # in the environment of benchmarks/kernels.py; some ten minutes

Nothing is run on a chip. Candidates that spill, need more shared memory than a multiprocessor has or do not use the
tensor core are left out; of the others the one is best whose estimate (benchmarks/kernels.py), as a share of the dense
product's, is lowest in the mean of GPUs and shapes; among those within a hundredth of it the one with fewest vector
instructions. One tile serves all GPUs: a program does not know which of them it is lowered for.

The table ends where, in the same mean, unpacking to memory and a dense product take no longer.
"""

import collections
import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import NamedTuple

os.environ['JAX_PLATFORMS'] = 'cpu'
sys.path.insert(0, str(Path(__file__).parents[1]))

import kernels_gpu
from absl import app
from kernels_roofline import Problem

from sparselora_jax.kernels import gpu
from sparselora_jax.packing.packed24 import BYTE, SCALED

TABLE = Path(gpu.__file__).with_name('gpu_tiles.py')
SHAPES = (4096, 4096), (4096, 11008)
SHARED = {80: 163 * 2**10, 90: 227 * 2**10, 100: 227 * 2**10}
CLASSES = {16: 16, 64: 64, 256: 128, 512: 128}  # most rows: rows of a tile


def candidates(rows: int, four_bits: bool):
    """Tiles of 4096 or 8192 weights."""
    for outputs, octets in itertools.product((32, 64, 128), (4, 8, 16, 32)):
        fits = not four_bits or octets <= SCALED // BYTE
        if fits and 4096 <= outputs * BYTE * octets <= 8192:
            yield gpu.Tile(rows, outputs, octets, warps=8 if rows > 64 else 4)


class Scores(NamedTuple):
    """Of a tile: means of GPUs and shapes."""

    of_dense: float
    vector: float  # seconds
    of_unpacked: float


def scores(job) -> dict[int, Scores]:
    """By most rows; none for what is no tile."""
    four_bits, transposed, tile = job
    parts = collections.defaultdict(list)
    for chip in kernels_gpu.GPUS:
        try:
            built = kernels_gpu.compiled(Problem(tile.rows, *SHAPES[0], four_bits, transposed), tile, chip.target)
        except Exception as error:  # Triton's passes fail on some
            print(f'{job}, {chip.name}: {type(error).__name__}', flush=True)
            return {}
        if built.stack or built.shared > SHARED[chip.target] or built.tensor == 'none':
            return {}
        for (most, rows), shape in itertools.product(CLASSES.items(), SHAPES):
            if rows == tile.rows:
                problem = Problem(most, *shape, four_bits, transposed)
                longer = shape[transposed] / SHAPES[0][transposed]  # the loop, which is along what is summed
                of_shape = built._replace(executed=built.executed * longer)
                terms = kernels_gpu.gpu_terms(chip, problem, tile, of_shape)
                dense, unpacked = (
                    max(kernels_gpu.dense_terms(chip, problem).values()),
                    kernels_gpu.unpacked_s(chip, problem),
                )
                longest = max(terms.values())
                parts[most].append(Scores(longest / dense, terms['vector'], longest / unpacked))
    return {most: Scores(*map(mean, zip(*of_class, strict=True))) for most, of_class in parts.items()}


def best(ranked: list[tuple[Scores, gpu.Tile]]) -> tuple[Scores, gpu.Tile]:
    """Of one class."""
    least = min(found.of_dense for found, _ in ranked)
    return min((one for one in ranked if one[0].of_dense < least + 0.01), key=lambda one: one[0].vector)


def main(argv):
    """Writes the table."""
    del argv
    jobs = [
        (four_bits, transposed, tile)
        for transposed, four_bits, rows in itertools.product((False, True), (False, True), sorted({*CLASSES.values()}))
        for tile in candidates(rows, four_bits)
    ]
    ranked = collections.defaultdict(list)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (four_bits, transposed, tile), found in zip(jobs, pool.map(scores, jobs), strict=True):
            for most, of_class in found.items():
                ranked[transposed, four_bits, most].append((of_class, tile))
                print(
                    'transposed' if transposed else 'forward', 'int4' if four_bits else 'values', most, tile, of_class
                )
    lines = []
    for transposed, four_bits in itertools.product((False, True), (False, True)):
        chosen = {most: best(ranked[transposed, four_bits, most]) for most in CLASSES}
        worth = itertools.takewhile(lambda one: one[1][0].of_unpacked < 1, chosen.items())
        tiles = tuple((most, tuple(tile)) for most, (_, tile) in worth)
        key = 'transposed' if transposed else 'forward', 'int4' if four_bits else 'values'
        lines.append(f'    {key}: (\n' + ''.join(f'        {one},\n' for one in tiles) + '    ),\n')
    TABLE.write_text(HEAD + 'TILES = {\n' + ''.join(lines) + '}\n')


HEAD = '''"""Tiles of the kernels in gpu.py; written by `python benchmarks/tune.py`.

Of a product and a kind of weights: up to so many rows this tile: rows, outputs, octets, warps, stages. Where the rows
are more than the last, unpacking to memory and a dense product are estimated to take no longer.
"""

'''


if __name__ == '__main__':
    app.run(main)
