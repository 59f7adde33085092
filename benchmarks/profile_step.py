"""Where one restoration step spends its time, by operation of the compiled program.

    taskset -c 0 python benchmarks/profile_step.py --gradient=exact

On one core operations do not overlap, so their times add up to the step's. Also prints the compiler's count of
temporary memory. Flags of `step.py` (`--batch`, `--answers`, ...) apply.
"""

import collections
import gzip
import json
import re
import tempfile
from pathlib import Path

import jax
import step as benchmark
from absl import app, flags

from sparselora_jax.restoration.restore import Frozen

GRADIENT = flags.DEFINE_enum('gradient', 'exact', benchmark.GRADIENTS, 'the step to trace')
TOP = flags.DEFINE_integer('top', 30, 'operations to print')


def operations(hlo: str) -> dict[str, str]:
    """Operation -> its shape and the end of its place in the source program."""
    found = {}
    for name, shape, kind, rest in re.findall(r'^\s*(?:ROOT )?%([\w.\-]+) = (\S+) ([\w\-]+)\((.*)$', hlo, re.M):
        place = re.search(r'op_name="([^"]*)"', rest)
        if kind not in ('while', 'call'):
            found[name] = f'{shape} {place[1][-70:] if place else ""}'
    return found


def main(argv):
    """Compile, runs two steps, traces the third."""
    del argv
    cfg, params, masks, lora, batch = benchmark.setup()
    step, state = benchmark.jax_step(GRADIENT.value, cfg, lora)
    frozen = Frozen(params, masks)
    compiled = step.lower(state, frozen, batch).compile()
    print(f'temporary memory: {compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f} MiB')
    for _ in range(2):
        state, _metrics = jax.block_until_ready(compiled(state, frozen, batch))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(compiled(state, frozen, batch))
        (file,) = Path(folder).rglob('perfetto_trace.json.gz')
        with gzip.open(file) as trace:
            events = json.load(trace)['traceEvents']
    known, total, kinds = operations(compiled.as_text()), collections.Counter(), collections.Counter()
    for event in events:
        if event.get('ph') == 'X' and event['name'] in known:
            total[event['name']] += event['dur'] / 1e3
            product = 'product of matrices' if 'dot' in known[event['name']] else re.sub(r'[\d.]+$', '', event['name'])
            kinds[product] += event['dur'] / 1e3
    print(f'sum {sum(total.values()):.0f} ms; by kind:')
    for kind, milliseconds in kinds.most_common(12):
        print(f'{milliseconds:9.1f} {kind}')
    print('by operation:')
    for name, milliseconds in total.most_common(TOP.value):
        print(f'{milliseconds:9.1f} {name:36} {known[name]}')


if __name__ == '__main__':
    app.run(main)
