"""The packed GPU kernels, compiled for GPUs that are not here: what benchmarks/kernels.py estimates with."""

import collections
import functools
import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from kernels_roofline import Chip, Problem, times

from sparselora_jax.planning import chips
from sparselora_jax.planning.tracing import nbytes
from sparselora_jax.sparse.kernels import gpu
from sparselora_jax.sparse.packing.packed24 import BYTE

GPUS = [
    Chip(
        f'{gpu.chip.name} (sm_{gpu.architecture.capability}0)',
        gpu.chip.bytes_s,
        gpu.chip.flops_s,
        gpu.architecture.cores,
        gpu.architecture.hertz,
        10 * gpu.architecture.capability,
    )
    for gpu in (chips.GPUS[name] for name in ('a100', 'h100', 'b200'))
]


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


def compiled(kind: str, problem: Problem, tile: gpu.Tile, capability: int) -> Compiled:
    """The kernel for whole tiles of rows."""
    wide = problem.outputs if problem.transposed else problem.inputs
    deep = tile.outputs if problem.transposed else BYTE * tile.octets
    x = jax.ShapeDtypeStruct((-(-problem.rows // tile.rows) * tile.rows, wide), jnp.bfloat16)
    text = triton_ir(functools.partial(gpu.MULTIPLY[kind], tile=tile), x, problem.packed)
    return compile_for(text, tile, capability, -(-wide // deep // tile.splits))


def gpu_terms(chip: Chip, problem: Problem, tile: gpu.Tile, found: Compiled) -> dict[str, float]:
    """Seconds of the three terms of a packed kernel."""
    across = problem.inputs // (BYTE * tile.octets) if problem.transposed else problem.outputs // tile.outputs
    programs = -(-problem.rows // tile.rows) * across * tile.splits
    most = -(-programs // chip.cores)  # of one multiprocessor
    vector_s = most * tile.warps * found.executed / (4 * chip.hertz)
    moved = problem.moved(nbytes(problem.packed))
    if tile.splits > 1:  # parts of sums are written, and read to be added
        moved += 2 * 4 * tile.splits * problem.rows * (problem.inputs if problem.transposed else problem.outputs)
    return times(chip, moved, problem.flops * most * chip.cores / programs, vector_s)


def dense_terms(chip: Chip, problem: Problem) -> dict[str, float]:
    """Seconds of a product with dense bf16 that only bytes and FLOPs bind."""
    return times(chip, problem.moved(2 * problem.inputs * problem.outputs), problem.flops, 0.0)


def unpacked_s(chip: Chip, problem: Problem) -> float:
    """Seconds of unpacking to memory, and of a dense product."""
    dense = 2 * problem.inputs * problem.outputs
    return (nbytes(problem.packed) + dense) / chip.bytes_s + max(dense_terms(chip, problem).values())


def on_gpus(rows: int, inputs: int, outputs: int) -> None:
    """Print one line a chip and kernel."""
    for chip, transposed in itertools.product(GPUS, (False, True)):
        product, where = ('g @ W.T' if transposed else 'x @ W'), f'{chip.name} | {rows} | {inputs}x{outputs}'
        dense = dense_terms(chip, Problem(rows, inputs, outputs, False, transposed))
        seconds = ' | '.join(f'{1e6 * term:.1f}' for term in dense.values())
        binds = max(dense, key=dense.get)
        print(f'| {where} | {product} | dense | | | | | | | 1.0000 | {seconds} | {binds} | | |', flush=True)
        for four_bits in (False, True):
            problem = Problem(rows, inputs, outputs, four_bits, transposed)
            kind, tile = gpu.choose_kernel(rows, problem.packed, transposed)
            if tile is None:
                print(
                    f'| {where} | {product} | packed{" int4" if four_bits else ""} | unpacked, then dense', flush=True
                )
                continue
            found = compiled(kind, problem, tile, chip.target)
            terms = gpu_terms(chip, problem, tile, found)
            deep = outputs if transposed else inputs
            across = BYTE * tile.octets if transposed else tile.outputs
            an_element = found.executed * 32 * tile.warps * tile.splits / (deep * across)
            share = nbytes(problem.packed) / (2 * inputs * outputs)
            print(
                f'| {where} | {product} | packed{" int4" if four_bits else ""} | {found.registers} | {found.stack} | '
                f'{found.shared} | {found.tensor} | {an_element:.1f} | '
                f'{problem.a_tile(tile.rows, across, tile.splits)} | {share:.4f} | '
                + ' | '.join(f'{1e6 * seconds:.1f}' for seconds in terms.values())
                + f' | {max(terms, key=terms.get)} | {max(terms.values()) / max(dense.values()):.2f} | '
                f'{max(terms.values()) / unpacked_s(chip, problem):.2f} |',
                flush=True,
            )
