"""Tiles of the packed GPU kernels: times candidates on the GPU of this machine and writes kernels/gpu_tiles.py.

  python benchmarks/tune.py    # some two minutes on an H200 with 16 cores, most of them to compile

A candidate's time is that of its kernels on the device (`gpu_times.py`), over weights that together no cache holds, and
that of the dense product of the same run is what it is divided by; the best has the lowest mean ratio over shapes. A
kernel is in the table up to the rows at which it is faster than the next one, or than to unpack and multiply.
"""

import collections
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from absl import app, flags
from gpu_times import kernel_seconds

import sparselora_jax as sl
from sparselora_jax.sparse.kernels import gpu
from sparselora_jax.sparse.packing.packed24 import BYTE, SCALED, pack24, quantise24, unpack24

SHAPES = flags.DEFINE_list('shapes', ['4096x4096', '4096x11008'], 'inputs x outputs')
TABLE = flags.DEFINE_string('table', str(Path(gpu.__file__).with_name('gpu_tiles.py')), 'the file that is written')
LAYERS = 12
ROWS = {16: 16, 64: 64, 256: 128}  # most rows: rows of a tile
KINDS = 'values', 'int4'


def tiles(rows: int, shapes: Iterable, warps: Iterable, stages: Iterable, splits: Iterable) -> Iterable[gpu.Tile]:
    """Every combination."""
    for (outputs, octets), *others in itertools.product(shapes, warps, stages, splits):
        yield gpu.Tile(rows, outputs, octets, *others)


def candidates(kernel: str, most: int, kind: str) -> list[gpu.Tile]:
    """For up to so many rows."""
    pairs = [(outputs, octets) for outputs in (32, 64, 128, 256) for octets in (4, 8, 16)]
    inside = {
        size: [(outputs, octets) for outputs, octets in pairs if size[0] <= BYTE * outputs * octets <= size[1]]
        for size in ((2048, 16384), (4096, 8192), (8192, 16384))
    }
    if kernel == 'unpack':
        found = tiles(1, inside[2048, 16384], (4, 8), (1,), (1,))
    elif kernel == 'few':
        found = tiles(1, inside[2048, 16384], (2, 4), (1,), (8, 16, 32))
    elif most == 16:
        warps, stages = ((2, 4), (3,)) if kind == 'int4' else ((4,), (3, 5))
        found = tiles(16, inside[4096, 8192], warps, stages, (4, 8, 16))
    elif most == 64:
        four_bits = kind == 'int4'
        found = tiles(64, inside[4096, 8192], (4, 8) if four_bits else (4,), (3,) if four_bits else (3, 4), (2, 4, 8))
    else:
        found = tiles(ROWS[most], inside[8192, 16384], (4, 8), (3,), (1, 2))
    return [tile for tile in found if kind == 'values' or tile.octets <= SCALED // BYTE]


class Weights:
    """Of one shape: packed ones of both kinds, and dense ones."""

    def __init__(self, inputs: int, outputs: int):
        values, dense = [], []
        for layer in range(LAYERS):
            kernel = jax.random.normal(jax.random.key(layer), (inputs, outputs), jnp.bfloat16)
            mask = jax.jit(sl.mask_from_scores, static_argnums=1)(jnp.abs(kernel), '2:4')
            values.append(pack24(jnp.where(mask, kernel, jnp.zeros((), kernel.dtype)), mask))
            dense.append(jax.jit(unpack24)(values[-1]))
        self.shape = inputs, outputs
        self.dense = dense
        self.packed = {'values': values, 'int4': [quantise24(packed) for packed in values]}

    def rows(self, count: int, kernel: str) -> jax.Array:
        """What is multiplied."""
        return jax.random.normal(jax.random.key(0), (count, self.shape[kernel == 'transposed']), jnp.bfloat16)


def over(function: Callable, *arguments, weights: list) -> Callable[[], object]:
    """A call that applies it to all weights."""
    return lambda: [function(*arguments, weight) for weight in weights]


def compiled(job: tuple[Callable, tuple]) -> Callable | None:
    """None: the tile needs more than the chip has."""
    function, arguments = job
    try:
        return jax.jit(function).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return None


def times(weights: Weights, kernel: str, kind: str, rows: int, found: list[gpu.Tile]) -> dict[gpu.Tile, float]:
    """Seconds of a call, of those that fit the chip."""
    packed = weights.packed[kind]
    if kernel == 'unpack':
        before = ()
        functions = [lambda one, tile=tile: gpu.unpack(one, jnp.bfloat16, tile) for tile in found]
    else:
        before = (weights.rows(rows, kernel),)
        functions = [functools.partial(gpu.MULTIPLY[kernel], tile=tile) for tile in found]
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(compiled, [(function, (*before, packed[0])) for function in functions]))
    fit = {tile: program for tile, program in zip(found, programs, strict=True) if program is not None}
    seconds = kernel_seconds([over(program, *before, weights=packed) for program in fit.values()])
    return {tile: one / LAYERS for tile, one in zip(fit, seconds, strict=True)}


def dense_seconds(weights: Weights, kernel: str, rows: int) -> float:
    """Of the dense product."""
    product = jax.jit(lambda x, w: x @ (w.T if kernel == 'transposed' else w))
    return kernel_seconds([over(product, weights.rows(rows, kernel), weights=weights.dense)])[0] / LAYERS


def best(ratios: dict[gpu.Tile, list[float]], shapes: int) -> tuple[float, gpu.Tile]:
    """The lowest mean ratio of those that fit all shapes."""
    return min((mean(of_tile), tile) for tile, of_tile in ratios.items() if len(of_tile) == shapes)


def main(argv):
    """Write the table."""
    del argv
    if jax.default_backend() != 'gpu':
        raise SystemExit(
            'tune.py times kernels: it needs an NVIDIA GPU and a jaxlib for it (pip install "jax[cuda13]")'
        )
    classes = [('few', 1), *itertools.product(('forward', 'transposed'), ROWS), ('unpack', 0)]
    ratios = collections.defaultdict(lambda: collections.defaultdict(list))
    unpacked = collections.defaultdict(list)  # dense product and unpacking, over the dense product
    at_one = collections.defaultdict(list)  # one row by `forward`
    for shape in SHAPES.value:
        weights = Weights(*map(int, shape.split('x')))
        for kind in KINDS:
            unpacking = times(weights, 'unpack', kind, 0, candidates('unpack', 0, kind))
            for kernel, most in classes:
                if kernel == 'unpack':
                    found, dense = unpacking, min(unpacking.values())
                else:
                    found = times(weights, kernel, kind, most, candidates(kernel, most, kind))
                    dense = dense_seconds(weights, kernel, most)
                    unpacked[kernel, most, kind].append(1 + min(unpacking.values()) / dense)
                for tile, seconds in found.items():
                    ratios[kernel, most, kind][tile].append(seconds / dense)
                if (kernel, most) == ('forward', 16):
                    few = times(weights, kernel, kind, 1, candidates(kernel, most, kind))
                    at_one[kind].append(min(few.values()) / dense_seconds(weights, kernel, 1))
                least = sorted((seconds, tile) for tile, seconds in found.items())[:3]
                shown = ', '.join(f'{1e6 * seconds:.1f} {tuple(tile)}' for seconds, tile in least)
                print(f'{shape} {kernel} {kind} {most} rows: dense {1e6 * dense:.1f} us; {shown}', flush=True)
    lines = []
    for kernel, kind in itertools.product(('few', 'forward', 'transposed', 'unpack'), KINDS):
        chosen = []
        for most in (most for of, most in classes if of == kernel):
            ratio, tile = best(ratios[kernel, most, kind], len(SHAPES.value))
            other = mean(at_one[kind] if kernel == 'few' else unpacked[kernel, most, kind] or [ratio])
            if ratio > other:
                break
            note = f'  # {ratio:.2f} of dense; next best {other:.2f}' if kernel != 'unpack' else ''
            chosen.append(f'        ({most}, {tuple(tile)}),{note}\n')
        lines.append(f'    ({kernel!r}, {kind!r}): (\n' + ''.join(chosen) + '    ),\n')
    Path(TABLE.value).write_text(
        HEAD.format(chip=jax.devices()[0].device_kind) + 'TILES = {\n' + ''.join(lines) + '}\n'
    )


HEAD = '''"""Fastest tiles of the kernels in gpu.py; written by `python benchmarks/tune.py` on an {chip}.

`TILES[kernel, weights]` lists `(max_rows, tile)`. The first entry whose `max_rows` is not exceeded is used. A tile is
(rows, outputs, octets, warps, stages, splits). With more rows than in the last entry, another kernel is faster, or
unpacking to memory and a dense product. Notes compare the time with the dense product's and with the next best way.
"""

'''


if __name__ == '__main__':
    app.run(main)
