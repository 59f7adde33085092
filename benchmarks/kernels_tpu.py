"""The packed TPU kernels, compiled for TPUs that are not here: what benchmarks/kernels.py estimates with."""

import functools
import itertools
import os
import re
import tempfile
from pathlib import Path

os.environ |= {'LIBTPU_INIT_ARGS': f'--xla_jf_dump_llo_text=true --xla_jf_dump_to={tempfile.mkdtemp()}'}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kernels_roofline import Chip, times

from sparselora_jax import chips
from sparselora_jax.kernels import tpu
from sparselora_jax.packing.like import packed24_like
from sparselora_jax.tracing import nbytes

DUMP = Path(os.environ['LIBTPU_INIT_ARGS'].split('=')[-1])  # of the TPU compiler
CORES = {'v5e': (1, 1.5e9, 'v5e:2x2'), 'v6e': (1, 1.75e9, 'v6e:2x2'), 'v5p': (2, 1.75e9, 'v5p:2x2x1')}
TPUS = [Chip(name, chips.TPUS[name].bytes_s, chips.TPUS[name].flops_s, *rest) for name, rest in CORES.items()]


def bundles() -> int:
    """Of the schedule of the one packed kernel that was compiled since the last call."""
    found = None
    for file in DUMP.iterdir():
        if re.search(r'matmul24.*schedule-analysis_final_bundles', file.name):
            found = int(re.search(r'total scheduled bundles:\s+(\d+)', file.read_text()).group(1))
        file.unlink()
    if found is None:
        raise SystemExit(f'{DUMP}: libtpu has left no schedule of matmul24; another version of it?')
    return found


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
    """Prints one line a chip and kernel."""
    dense = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    x, g = (jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for size in (inputs, outputs))
    for chip, transposed in itertools.product(TPUS, (False, True)):
        matrix, product = (g, tpu.matmul_transposed) if transposed else (x, tpu.matmul)
        dense_product = (lambda x, w: x @ w.T) if transposed else jnp.matmul
        kernels = {'dense': (dense_product, dense, 0)}
        for name, four_bits in (('packed', False), ('packed int4', True)):
            packed = packed24_like(dense, four_bits=four_bits)
            tile = tpu.tile(rows, packed, transposed)
            steps = -(-rows // tile.rows) * -(-inputs // tile.inputs) * -(-outputs // tile.outputs)
            kernels[name] = functools.partial(product, tile=tile), packed, steps
        estimates = {}
        for name, (fn, weights, steps) in kernels.items():
            compiled = compiled_for_tpu(chip, fn, matrix, weights)
            vector_s = steps * bundles() / chip.cores / chip.hertz if steps else 0.0
            size = nbytes(weights)
            # int4 scales make two numbers of one of g.
            flops = (4 if transposed and name == 'packed int4' else 2) * rows * inputs * outputs
            terms = times(chip, size + 2 * rows * (inputs + outputs), flops, vector_s)
            estimates[name] = max(terms.values())
            ratio = '' if name == 'dense' else f'{estimates[name] / estimates["dense"]:.2f}'
            columns = [chip.name, rows, f'{inputs}x{outputs}', name + ', transposed' * transposed]
            columns += [f'{size / nbytes(dense):.4f}', *(f'{1e6 * term:.1f}' for term in terms.values())]
            columns += [max(terms, key=terms.get), ratio, *said_by_xla(compiled)]
            print('| ' + ' | '.join(map(str, columns)) + ' |', flush=True)
