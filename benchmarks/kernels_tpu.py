"""The packed TPU kernels, compiled for TPUs that are not here: what benchmarks/kernels.py estimates with."""

import functools
import itertools
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ |= {'LIBTPU_INIT_ARGS': f'--xla_jf_dump_llo_text=true --xla_jf_dump_to={tempfile.mkdtemp()}'}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kernels_roofline import Chip, Problem, times

from sparselora_jax.planning import chips
from sparselora_jax.planning.tracing import nbytes
from sparselora_jax.sparse.kernels import tpu
from sparselora_jax.sparse.packing.packed24 import shapes24

DUMP = Path(os.environ['LIBTPU_INIT_ARGS'].split('=')[-1])  # of the TPU compiler
CORES = {'v5e': (1, 1.5e9, 'v5e:2x2'), 'v6e': (1, 1.75e9, 'v6e:2x2'), 'v5p': (2, 1.75e9, 'v5p:2x2x1')}
TPUS = [Chip(name, chips.TPUS[name].bytes_s, chips.TPUS[name].flops_s, *rest) for name, rest in CORES.items()]


class Dumped(NamedTuple):
    """What the TPU compiler has written of a kernel."""

    bundles: int  # of its schedule
    vmem: int  # bytes it allocates: each window twice, scratch, spilled registers
    spilled: int  # bytes of these


def dumped(kernel: str) -> Dumped:
    """Of the one whose name begins so, or of several that with most VMEM, compiled since the last call."""
    found, scheduled = [], re.compile(rf'(.*-{kernel}.*)-\d+-schedule-analysis_final_bundles.txt')
    for name in filter(None, map(scheduled.fullmatch, os.listdir(DUMP))):
        bundles = re.search(r'total scheduled bundles:\s+(\d+)', (DUMP / name[0]).read_text())
        for file in DUMP.glob(f'{name[1]}-*-post-delay-converter.txt'):  # the last to say what is allocated
            places = re.findall(r'#allocation\d+(_spill)? \[.*?space=vmem, size = (0x[0-9a-f]+)', file.read_text())
            vmem, spilled = (sum(int(size, 16) for spill, size in places if spill or every) for every in (True, False))
            found.append(Dumped(int(bundles[1]), vmem, spilled))
    for file in DUMP.iterdir():
        file.unlink()
    if not found:
        raise SystemExit(f'{DUMP}: libtpu has left no schedule of {kernel or "a kernel"}; another version of it?')
    return max(found, key=lambda kernel: kernel.vmem)


def compiled_for_tpu(chip: Chip, fn, *args):
    """As in a program that runs on one of them."""
    devices = topologies.get_topology_desc(platform='tpu', topology_name=chip.target).devices[:1]
    sharding = NamedSharding(Mesh(np.array(devices), ('one',)), PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), args)
    return jax.jit(fn).lower(*placed).compile()


def said_by_xla(compiled) -> tuple[str, str]:
    """Its `optimal_seconds`, in us, where they are a time at all, and MB of HBM."""
    seconds, memory = compiled.cost_analysis()['optimal_seconds'], compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return f'{1e6 * seconds:.1f}' if seconds > 0 else '', f'{held / 1e6:.1f}'


def on_tpus(rows: int, inputs: int, outputs: int) -> None:
    """Print one line a chip and kernel."""
    dense = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    x, g = (jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for size in (inputs, outputs))
    for chip, transposed in itertools.product(TPUS, (False, True)):
        matrix, product = (g, tpu.matmul_transposed) if transposed else (x, tpu.matmul)
        dense_product = (lambda x, w: x @ w.T) if transposed else jnp.matmul
        kernels = {'dense': (dense_product, dense, None)}
        for name, four_bits in (('packed', False), ('packed int4', True)):
            packed = shapes24(dense, four_bits=four_bits)
            tile = tpu.choose_tile(rows, packed, transposed)
            kernels[name] = functools.partial(product, tile=tile), packed, tile
        estimates = {}
        for name, (fn, weights, tile) in kernels.items():
            problem = Problem(rows, inputs, outputs, name == 'packed int4', transposed)
            compiled = compiled_for_tpu(chip, fn, matrix, weights)
            kernel, vector_s, a_tile = dumped('matmul24' if tile else ''), 0.0, ''
            if tile:
                steps = -(-rows // tile.rows) * -(-inputs // tile.inputs) * -(-outputs // tile.outputs)
                vector_s = steps * kernel.bundles / chip.cores / chip.hertz
                a_tile = problem.a_tile(tile.rows, tile.inputs if transposed else tile.outputs)
            # int4 scales make two numbers of one of g.
            flops = problem.flops * (2 if transposed and problem.four_bits else 1)
            terms = times(chip, problem.moved(nbytes(weights)), flops, vector_s)
            estimates[name] = max(terms.values())
            ratio = '' if name == 'dense' else f'{estimates[name] / estimates["dense"]:.2f}'
            columns = [chip.name, rows, f'{inputs}x{outputs}', name + ', transposed' * transposed, a_tile]
            columns += [f'{nbytes(weights) / nbytes(dense):.4f}', *(f'{1e6 * term:.1f}' for term in terms.values())]
            columns += [max(terms, key=terms.get), ratio, *said_by_xla(compiled)]
            columns += [f'{size / 1e6:.2f}' for size in (kernel.vmem, kernel.spilled)]
            print('| ' + ' | '.join(map(str, columns)) + ' |', flush=True)
