"""x @ packed 2:4 weights against x @ dense ones on GPUs and TPUs: compiled for them here, not run.

  pip install -r requirements.txt -r benchmarks/requirements-kernels.txt   # in an environment of its own
  python benchmarks/kernels.py [--rows=1,16,64] [--shapes=4096x4096,4096x11008]

Nothing below was timed on a chip: the programs are compiled for it, and their time is the largest of three terms:

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

import collections
import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'}
os.environ |= {'LIBTPU_INIT_ARGS': f'--xla_jf_dump_llo_text=true --xla_jf_dump_to={tempfile.mkdtemp()}'}
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparselora_jax.kernels import gpu, tpu
from sparselora_jax.packing.like import packed24_like
from sparselora_jax.packing.packed24 import BYTE, Packed24

DUMP = Path(os.environ['LIBTPU_INIT_ARGS'].split('=')[-1])  # of the TPU compiler
ROWS = flags.DEFINE_list('rows', ['1', '16', '64', '256'], 'rows of x')
SHAPES = flags.DEFINE_list('shapes', ['4096x4096', '4096x11008'], 'inputs x outputs')


class Chip(NamedTuple):
    """Rates of the vendors' data sheets, dense bf16."""

    name: str
    bytes_s: float
    flops_s: float
    cores: int  # multiprocessors; of a TPU 1
    hertz: float
    target: int | str  # compute capability, or the topology's name


GPUS = (
    Chip('A100 80 GB (sm_80)', 2.04e12, 312e12, 108, 1.41e9, 80),
    Chip('H100 SXM (sm_90)', 3.35e12, 989e12, 132, 1.83e9, 90),
    Chip('B200 (sm_100)', 8.0e12, 2250e12, 148, 1.85e9, 100),
)
TPUS = (
    Chip('v5e', 0.819e12, 197e12, 1, 1.5e9, 'v5e:2x2'),
    Chip('v6e', 1.64e12, 918e12, 1, 1.75e9, 'v6e:2x2'),
    Chip('v5p', 2.765e12, 459e12, 2, 1.75e9, 'v5p:2x2x1'),
)


def triton_ir(fn, *args) -> str:
    """What a Pallas kernel hands to Triton, as text."""
    from jax._src.lib import triton
    from jax._src.lib.mlir import ir

    module = jax.jit(fn).trace(*args).lower(lowering_platforms=('cuda',)).compiler_ir()
    found = []

    def walk(op):
        for block in (block for region in op.regions for block in region.blocks):
            for inner in block.operations:
                if inner.name == 'stablehlo.custom_call' and 'mhlo.backend_config' in inner.attributes:
                    found.extend(a.attr for a in inner.attributes['mhlo.backend_config'] if a.name == 'ir')
                walk(inner.operation)

    walk(module.operation)
    with ir.Context() as context:
        triton.dialect.register_dialect(context)
        context.load_all_available_dialects()
        return ir.Module.parse(found[0].value_bytes).operation.get_asm(enable_debug_info=False)


class Compiled(NamedTuple):
    """What a GPU kernel is made of."""

    registers: int
    stack: int  # bytes of spilled registers
    shared: int  # bytes
    tensor: str  # tensor-core instructions of its PTX
    executed: int  # instructions, by a warp


def compile_for(text: str, tile: gpu.Tile, capability: int, rounds: int) -> Compiled:
    """Through Triton's own passes, as in a program that runs."""
    import triton
    from triton._C.libtriton import ir
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    target, knobs = GPUTarget('cuda', capability, 32), {'num_warps': tile.warps, 'num_stages': tile.stages}
    backend, context = CUDABackend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'kernel.ttir'
        path.write_text(text)
        module = ir.parse_mlir_module(str(path), context)
        module.context = context
        # A .ttir file begins behind the first passes; XLA runs them.
        path.write_text(str(backend.make_ttir(module, {}, backend.parse_options(knobs), capability)))
        kernel = triton.compile(str(path), target=target, options=knobs)
        cubin = Path(folder) / 'kernel.cubin'
        cubin.write_bytes(kernel.asm['cubin'])
        tool = Path(nvidia.__file__).parent / 'bin' / 'cuobjdump'
        said = [subprocess.run([tool, flag, cubin], capture_output=True, text=True) for flag in ('-sass', '-res-usage')]
    usage = said[1].stdout + said[1].stderr
    numbers = {name: int(re.search(rf'{name}:(\d+)', usage).group(1)) for name in ('REG', 'STACK')}
    kinds = collections.Counter(re.findall(r'\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b', kernel.asm['ptx']))
    tensor = ', '.join(f'{count} {kind}' for kind, count in kinds.items()) or 'none'
    return Compiled(numbers['REG'], numbers['STACK'], kernel.metadata.shared, tensor, executed(said[0].stdout, rounds))


def executed(sass: str, rounds: int) -> int:
    """Instructions that a warp executes, where its longest loop has that many rounds; without a loop, all of them.

    Behind the last exit stand waits that spin, and jump back into the code: no loops.
    """
    lines = re.findall(r'^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_]+)([^;]*);', sass, re.M)
    code = [(int(address, 16), name, rest) for address, name, rest in lines if name != 'NOP']
    jumps = [(re.search(r'0x([0-9a-f]+)', rest), at) for at, name, rest in code if name == 'BRA']
    end = max(at for at, name, _ in code if name == 'EXIT')
    loops = [(int(to.group(1), 16), at) for to, at in jumps if to and int(to.group(1), 16) < at < end]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    inside = sum(first <= at <= last for at, _, _ in code)
    return len(code) + (rounds - 1) * inside


def times(chip: Chip, moved: float, flops: float, vector_s: float) -> dict[str, float]:
    """Seconds of the three terms."""
    return {'bytes': moved / chip.bytes_s, 'matmul': flops / chip.flops_s, 'vector': vector_s}


class Problem(NamedTuple):
    """One product: `x @ W`, or `g @ W.T` (transposed), W being `[inputs, outputs]`."""

    rows: int
    inputs: int
    outputs: int
    four_bits: bool
    transposed: bool

    @property
    def packed(self) -> Packed24:
        """Shapes of its weights."""
        return packed24_like(jax.ShapeDtypeStruct((self.inputs, self.outputs), jnp.bfloat16), four_bits=self.four_bits)

    def moved(self, weights: float) -> float:
        """Bytes, where the weights are so many."""
        return weights + 2 * self.rows * (self.inputs + self.outputs)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


def compiled(problem: Problem, tile: gpu.Tile, capability: int) -> Compiled:
    """The kernel for whole tiles of rows."""
    wide = problem.outputs if problem.transposed else problem.inputs
    deep = tile.outputs if problem.transposed else BYTE * tile.octets
    kernel = gpu.matmul_transposed if problem.transposed else gpu.matmul
    x = jax.ShapeDtypeStruct((-(-problem.rows // tile.rows) * tile.rows, wide), jnp.bfloat16)
    text = triton_ir(functools.partial(kernel, tile=tile), x, problem.packed)
    return compile_for(text, tile, capability, wide // deep)


def gpu_terms(chip: Chip, problem: Problem, tile: gpu.Tile, found: Compiled) -> dict[str, float]:
    """Seconds of the three terms of a packed kernel."""
    across = problem.inputs // (BYTE * tile.octets) if problem.transposed else problem.outputs // tile.outputs
    programs = -(-problem.rows // tile.rows) * across
    most = -(-programs // chip.cores)  # of one multiprocessor
    vector_s = most * tile.warps * found.executed / (4 * chip.hertz)
    moved = problem.moved(packed_bytes(problem.packed))
    return times(chip, moved, problem.flops * most * chip.cores / programs, vector_s)


def dense_terms(chip: Chip, problem: Problem) -> dict[str, float]:
    """Seconds of a product with dense bf16 that only bytes and FLOPs bind."""
    return times(chip, problem.moved(2 * problem.inputs * problem.outputs), problem.flops, 0.0)


def unpacked_s(chip: Chip, problem: Problem) -> float:
    """Seconds of unpacking to memory, and of a dense product."""
    dense = 2 * problem.inputs * problem.outputs
    return (packed_bytes(problem.packed) + dense) / chip.bytes_s + max(dense_terms(chip, problem).values())


def on_gpus(rows: int, inputs: int, outputs: int) -> None:
    """Prints one line a chip and kernel."""
    for chip, transposed in itertools.product(GPUS, (False, True)):
        product, where = ('g @ W.T' if transposed else 'x @ W'), f'{chip.name} | {rows} | {inputs}x{outputs}'
        dense = dense_terms(chip, Problem(rows, inputs, outputs, False, transposed))
        seconds = ' | '.join(f'{1e6 * term:.1f}' for term in dense.values())
        binds = max(dense, key=dense.get)
        print(f'| {where} | {product} | dense | | | | | | 1.0000 | {seconds} | {binds} | | |', flush=True)
        for four_bits in (False, True):
            problem = Problem(rows, inputs, outputs, four_bits, transposed)
            tile = gpu.tile(rows, problem.packed, transposed)
            found = compiled(problem, tile, chip.target)
            terms = gpu_terms(chip, problem, tile, found)
            deep = outputs if transposed else inputs
            across = BYTE * tile.octets if transposed else tile.outputs
            an_element = found.executed * 32 * tile.warps / (deep * across)
            share = packed_bytes(problem.packed) / (2 * inputs * outputs)
            print(
                f'| {where} | {product} | packed{" int4" if four_bits else ""} | {found.registers} | {found.stack} | '
                f'{found.shared} | {found.tensor} | {an_element:.1f} | {share:.4f} | '
                + ' | '.join(f'{1e6 * seconds:.1f}' for seconds in terms.values())
                + f' | {max(terms, key=terms.get)} | {max(terms.values()) / max(dense.values()):.2f} | '
                f'{max(terms.values()) / unpacked_s(chip, problem):.2f} |',
                flush=True,
            )


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
            size = packed_bytes(weights)
            # int4 scales make two numbers of one of g.
            flops = (4 if transposed and name == 'packed int4' else 2) * rows * inputs * outputs
            terms = times(chip, size + 2 * rows * (inputs + outputs), flops, vector_s)
            estimates[name] = max(terms.values())
            ratio = '' if name == 'dense' else f'{estimates[name] / estimates["dense"]:.2f}'
            columns = [chip.name, rows, f'{inputs}x{outputs}', name + ', transposed' * transposed]
            columns += [f'{size / packed_bytes(dense):.4f}', *(f'{1e6 * term:.1f}' for term in terms.values())]
            columns += [max(terms, key=terms.get), ratio, *said_by_xla(compiled)]
            print('| ' + ' | '.join(map(str, columns)) + ' |', flush=True)


def packed_bytes(packed: Packed24) -> int:
    """Of its arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))


def main(argv):
    """Prints both tables."""
    del argv
    terms = ('bytes of bf16', 'bytes, us', 'matmul, us', 'vector, us', 'binds', 'packed / dense')
    first = ('chip', 'rows', 'weights')
    built = ('registers', 'spilled, B', 'shared, B', 'tensor core', 'instructions an element')
    print('Static estimates: nothing was run on a chip.')
    gpu_head = *first, 'product', 'kernel', *built, *terms, 'packed / (unpack, then dense)'
    tpu_head = *first, 'kernel', *terms, 'XLA says, us', 'HBM, MB'
    for head, table in ((gpu_head, on_gpus), (tpu_head, on_tpus)):
        print('\n| ' + ' | '.join(head) + ' |\n' + '|---' * len(head) + '|')
        for rows in map(int, ROWS.value):
            for shape in SHAPES.value:
                table(rows, *map(int, shape.split('x')))


if __name__ == '__main__':
    app.run(main)
