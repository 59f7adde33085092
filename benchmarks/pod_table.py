"""Compile models for slices of chips that are not here, and prints the tables of docs/scaling.md.

pip install -r requirements-tpu.txt -r requirements-gpu.txt
python benchmarks/pod_table.py            # goes on where it stopped; hours on two cores
python benchmarks/pod_table.py --table    # of what is there
python benchmarks/pod_table.py --slices='8 H100,8 A100'

Language-only 2:4 pruning by Wanda, then restoration with the dense model as the teacher: bf16 base, LoRA of the
paper's ranks, blocks recomputed in the backward. A step and the calibration set have 16 samples for every chip. A row
is one run of `launch/compile.py`: a step on the best mesh, a calibration pass on the same one.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import app, flags

GIB = 2**30
ROWS = 16  # samples a chip
WORKDIR = flags.DEFINE_string('workdir', 'runs/pod_table', 'where each row is kept')
TABLE = flags.DEFINE_bool('table', False, 'print the tables of what is there, compile nothing')
TRIES = flags.DEFINE_integer('tries', 3, 'meshes that are compiled for a slice, of those that fit by shapes')

MODELS = {
    'Salesforce/instructblip-vicuna-13b': 'configs/instructblip_lang_only.py',
    'Salesforce/blip2-opt-6.7b': 'configs/blip2_lang_only.py:data=data',
    'Salesforce/instructblip-flan-t5-xxl': 'configs/instructblip_lang_only.py',
}
SLICES = {  # name -> topology, in the order in which they are compiled
    'v5e-8': 'v5e:2x4',
    'v5e-4': 'v5e:2x2',
    'v5e-256': 'v5e:16x16',
    'v5e-16': 'v5e:4x4',
    'v5e-64': 'v5e:8x8',
    'v6e-256': 'v6e:16x16',
    'v5p 64 chips': 'v5p:4x4x4',
    '8 H100': 'h100:8',
    '8 A100': 'a100:8',
}
CHOSEN = flags.DEFINE_list('slices', list(SLICES), 'of the tables')
flags.register_validator('slices', lambda names: set(names) <= set(SLICES), f'expected some of {", ".join(SLICES)}')
COLUMNS = 'slice', 'mesh', 'GiB a chip', 'TFLOP a chip', 'GiB sent', 'matmuls, s', 'memory, s', 'links, s', 'tokens/s'
LARGE, SMALL = 'v5e-256', 'v5e-4'  # weak scaling: with as many tokens a chip, time of one over that of the other


def main(argv):
    """Compile what is missing, then prints."""
    del argv
    for model, config in () if TABLE.value else MODELS.items():
        for slice_ in CHOSEN.value:
            for program in ('restore', 'calibrate'):
                if not file_of(model, slice_, program).exists():
                    compile_row(model, config, slice_, program)
    for program, of in {'restore': 'A restoration step', 'calibrate': 'A calibration pass'}.items():
        for model in MODELS:
            print_table(model, program, of)


def chips(slice_):
    """How many a slice has."""
    return math.prod(map(int, SLICES[slice_].split(':')[1].split('x')))


def file_of(model, slice_, program):
    """Where `launch/compile.py` leaves a row."""
    return Path(WORKDIR.value) / f'{model.replace("/", "--")}-{program}-{SLICES[slice_].replace(":", "-")}.json'


def compile_row(model, config, slice_, program):
    """One row, in a process of its own."""
    samples = ROWS * chips(slice_)
    fields = {'dtype': 'bfloat16', 'restore.batch': samples, 'restore.remat': True}
    fields |= {'prune.samples': samples, 'prune.chunk': ROWS}
    mesh = ['--mesh=best', f'--tries={TRIES.value}']
    if program == 'calibrate':
        if (step := best(model, slice_, 'restore')) is None:
            return
        fields |= {f'mesh.{axis}': count for axis, count in step['mesh'].items()}
        mesh = []
    flags_ = [f'--config={config}', *(f'--config.{name}={value}' for name, value in fields.items()), *mesh]
    script = [sys.executable, 'launch/compile.py', model, f'--topology={SLICES[slice_]}', f'--program={program}']
    subprocess.run([*script, *flags_, f'--workdir={WORKDIR.value}'], check=False)


def best(model, slice_, program):
    """The figures on the fastest mesh that fits; None: there is none, or none was compiled yet."""
    file = file_of(model, slice_, program)
    return json.loads(file.read_text())['best'] if file.exists() else None


def print_table(model, program, of):
    """In Markdown, a row for each slice."""
    columns = *COLUMNS, 'dollars, 25,000 samples', 'compiled in, s'
    print(f'\n{of} of {model}:\n\n| ' + ' | '.join(columns) + ' |\n' + '|---' * len(columns) + '|')
    for slice_ in sorted(CHOSEN.value, key=lambda name: (name[:3], chips(name))):
        cells = [slice_, *row(model, slice_, program)]
        print('| ' + ' | '.join(cells + [''] * (len(columns) - len(cells))) + ' |')
    ends = [best(model, slice_, program) for slice_ in (LARGE, SMALL) if slice_ in CHOSEN.value]
    if len(ends) == 2 and all(ends):
        large, small = ends
        print(f'\n{LARGE} over {SMALL}: {large["roofline"]["seconds"] / small["roofline"]["seconds"]:.3f}')


def row(model, slice_, program):
    """The cells of a slice after its name."""
    if not file_of(model, slice_, program).exists():
        return ['not compiled']
    if (found := best(model, slice_, program)) is None:
        return ['no mesh fits']
    line = found['roofline']
    mesh = ' '.join(f'{axis}={count}' for axis, count in found['mesh'].items() if count > 1) or 'one chip'
    sent = sum(of_kind['bytes'] for of_kind in found['collectives'].values())
    figures = [mesh, f'{found["total"] / GIB:.1f}', f'{found["flops"] / 1e12:.0f}', f'{sent / GIB:.1f}']
    figures += [f'{line[term]:.2f}' for term in ('matmuls', 'memory', 'links')]
    dollars = '' if found['dollars_25k'] is None else f'{found["dollars_25k"]:.2f}'
    return [*figures, f'{found["tokens_s"]:,.0f}', dollars, f'{found["compilation_s"]:.0f}']


if __name__ == '__main__':
    app.run(main)
