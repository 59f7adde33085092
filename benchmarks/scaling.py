"""What surrounds a restoration step of the demo's recipe: input, host, checkpoints, and being killed.

    python benchmarks/scaling.py

In one run, ratios side by side:

  input        samples a second that the input pipeline makes, alone, over those that the step consumes; in turn
  shares       of the steps that `--config.profile=True` traces: waiting for the batch; running the program (the union
               of its operations); the host is what is left. By the trace's own events
  checkpoints  steps in blocks of `--every`, each with a checkpoint at its start or without, in the order with, without,
               without, with: what one checkpoint costs, whatever the loop does meanwhile, over the steps between two;
               by the clock, and in CPU seconds of all threads, which other work on the machine disturbs less
  goodput      `launch/train.py`, killed `--kills` times while it restores, each time in a step that was drawn before
               (seeded), and started again. Of the time from the first start to the restored weights: steps that count,
               start-up, compilation (with what else comes before the first step of a run: a checkpoint is read), steps
               that were lost. What a checkpoint costs is in the steps; evaluation and pruning were done before
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from absl import app, flags
from absl import logging as absl_logging
from timing import seconds

from configs import blip2_lang_only
from sparselora_jax.jobs import stages
from sparselora_jax.jobs.job import Job
from sparselora_jax.recipe import lora_rules, restore_program
from sparselora_jax.restoration.saved_state import Checkpoints
from sparselora_jax.restoration.train import fit, init_state
from sparselora_jax.runtime import profiling
from sparselora_jax.sparse.weights import init_lora

ROOT = Path(__file__).parents[1]
EVERY = flags.DEFINE_integer('every', 5, 'steps between checkpoints where their cost is measured')
BLOCKS = flags.DEFINE_integer('blocks', 8, 'of so many steps, half of them with a checkpoint; a multiple of 4')
STEPS = flags.DEFINE_integer('steps', 60, 'of the restoration that is killed')
KILLS = flags.DEFINE_integer('kills', 2, 'of it')
SEED = flags.DEFINE_integer('seed', 0, 'of the steps in which it is killed')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'of input and step in turn')

INPUT_GOAL, CHECKPOINT_GOAL = 20, 0.03


def verdict(figure: float, goal: float, error: float = 0.0) -> str:
    """Of an upper bound, which a figure settles where two standard errors do not reach it."""
    return 'not settled' if abs(figure - goal) < 2 * error else 'holds' if figure <= goal else 'missed'


def tell(what: str, figure: str) -> None:
    """A row of the table, as soon as it is known."""
    print(f'| {what} | {figure} |', flush=True)


class Switched(Checkpoints):
    """Checkpoints of which only every other block, in the order with, without, without, with, has one."""

    def save(self, step: int, tree: Any) -> None:
        """Save, or does nothing."""
        if (step // EVERY.value) % 4 < 2:
            super().save(step, tree)


class Restoration:
    """The step of a pruned job, and states to begin with."""

    def __init__(self, job: Job):
        self.job, self.base = job, job.base
        self.step, self.tx = restore_program(job.model, job.config, job.mesh)
        self.batches = job.batches(job.config.restore.batch, job.config.seed)

    def state(self) -> Any:
        """The first one; a step takes it for its own."""
        key = jax.random.key(self.job.config.seed)
        return init_state(init_lora(key, self.base.params, lora_rules(self.job.config)), self.tx)

    def fit(self, steps: int, checkpoints: Checkpoints, every: int, profile: Path | None = None) -> np.ndarray:
        """Train by the library's own loop; (time, seconds of all threads of this process) at the end of each step."""
        ends = []
        loop = {'steps': steps, 'checkpoints': checkpoints, 'every': every, 'profile': profile}

        def log(step, metrics):
            ends.append((time.perf_counter(), time.process_time()))

        fit(self.step, self.state(), self.base, self.batches, **loop, log=log)
        return np.array(ends)


def input_over_step(restoration: Restoration) -> tuple[float, float]:
    """Samples a second: of the pipeline alone, of the step with its batch at hand; after one step that compiles."""
    size, state = restoration.job.config.restore.batch, restoration.state()
    batch, position = restoration.batches[0], 1

    def step():
        nonlocal state
        state, metrics = restoration.step(state, restoration.base, batch)
        jax.block_until_ready(metrics)

    def draw(count):
        nonlocal position
        for _ in range(count):
            restoration.batches[position]
            position += 1

    step()
    draw(8)
    rounds = [(seconds(lambda: draw(8)) / 8, seconds(step)) for _ in range(ROUNDS.value)]
    made, consumed = np.median(rounds, axis=0)
    return size / made, size / consumed


def covered(intervals: Iterable[tuple[float, float]], within: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals, as far as it lies within others that do not overlap."""
    found: list[tuple[float, float]] = []
    clipped = [(max(a, c), min(b, d)) for a, b in intervals for c, d in within if a < d and c < b]
    for start, end in sorted(clipped):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def shares(folder: Path) -> dict[str, float]:
    """Of the traced steps' time: the program's, its batch's while no program runs, and the rest."""
    (file,) = folder.glob('plugins/profile/*/*.xplane.pb')
    found: dict[str, list[tuple[float, float]]] = {'steps': [], 'data': [], 'device': []}
    names = {profiling.STEP: 'steps', profiling.DATA: 'data'}
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for event in (event for line in plane.lines for event in line.events):
            kind = names.get(event.name)
            if kind or any(name == 'hlo_op' for name, _ in event.stats):
                interval = event.start_ns, event.start_ns + event.duration_ns
                found[kind or 'device'].append(interval)

    def length(intervals):
        return sum(end - start for start, end in intervals)

    steps = sorted(found['steps'])
    device = covered(found['device'], steps)
    either = covered(found['device'] + found['data'], steps)
    whole, device, either = length(steps), length(device), length(either)
    return {'data': (either - device) / whole, 'host': 1 - either / whole, 'device': device / whole}


def checkpoint_seconds(restoration: Restoration, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(time, seconds of all threads) of each block with a checkpoint, and of each without."""
    every, count = EVERY.value, BLOCKS.value
    ends = restoration.fit((count + 1) * every, Switched(folder), every)
    blocks = np.diff(ends[every - 1 :: every], axis=0)  # without the first, which has no checkpoint at its start
    with_one = np.arange(1, count + 1) % 4 < 2
    return blocks[with_one], blocks[~with_one]


def records(workdir: Path) -> list[tuple[int, float]]:
    """(step, its seconds) of every step of restoration that the log has, those done again included."""
    log = workdir / 'log.jsonl'
    lines = log.read_text().splitlines() if log.exists() else []
    found = [json.loads(line) for line in lines if line.endswith('}')]  # not those that a kill has cut off
    return [(record['step'], record['seconds']) for record in found if record['stage'] == 'restore']


def watch(command: list[str], workdir: Path, victim: int, pause: float) -> tuple[float, float, list[tuple[int, float]]]:
    """Run a command until it has restored; or kills it, `pause` seconds after step `victim`.

    Returns:
      (seconds of the run, those of the step in which it was killed, (step, seconds) of its whole ones).
    """
    before, started = len(records(workdir)), time.monotonic()
    with (workdir / 'output.txt').open('ab') as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    seen, partial = before, 0.0
    try:
        while not (workdir / 'restore.json').exists():
            if process.poll() is not None:
                raise RuntimeError(f'it ended by itself: {(workdir / "output.txt").read_text()[-2000:]}')
            time.sleep(0.02)
            if len(done := records(workdir)) > seen:
                seen, last = len(done), time.monotonic()
                if done[-1][0] >= victim:
                    time.sleep(pause)
                    partial = time.monotonic() - last
                    break
        return time.monotonic() - started, partial, records(workdir)[before:]
    finally:
        process.kill()  # SIGKILL
        process.wait()


def goodput(prepared: Path, folder: Path, overrides: dict[str, Any], step_s: float) -> dict[str, float]:
    """Seconds of the parts of a restoration that is killed; they add up to all of its time."""
    for name in ('evaluate_dense', 'evaluate_pruned', 'prune', 'questions', 'config'):
        shutil.copy(prepared / f'{name}.json', folder)
    shutil.copy(prepared / 'masks.safetensors', folder)
    command = [sys.executable, 'launch/train.py', '--config=configs/blip2_lang_only.py', f'--workdir={folder}']
    command += [f'--config.{name}={value}' for name, value in overrides.items()]
    rng, steps = np.random.default_rng(SEED.value), STEPS.value
    victims = sorted(rng.choice(np.arange(1, steps - 1), KILLS.value, replace=False).tolist())
    runs = []
    for victim in [*victims, steps + 1]:
        runs.append(watch(command, folder, victim, float(rng.uniform(0, step_s))))
        wall, _, done = runs[-1]
        end = 'killed' if victim < steps else 'done'
        tell(f'run {len(runs)}: steps {done[0][0]} to {done[-1][0]}, then {end}', f'{wall:.1f} s')
    usual = float(np.median([taken for *_, done in runs for _, taken in done[1:]]))
    counts = {step: number for number, (*_, done) in enumerate(runs) for step, _ in done}  # the run whose step counts
    parts = {'steps that count': 0.0, 'lost steps': 0.0, 'start-up': 0.0, 'compilation': 0.0}
    for number, (wall, partial, done) in enumerate(runs):
        parts['lost steps'] += partial
        parts['start-up'] += wall - partial - sum(taken for _, taken in done)
        parts['compilation'] += done[0][1] - usual
        for step, taken in [(done[0][0], usual), *done[1:]]:
            parts['steps that count' if counts[step] == number else 'lost steps'] += taken
    return parts


def main(argv):
    """Measure one after the other and prints a table."""
    del argv
    absl_logging.set_verbosity(absl_logging.ERROR)  # of the libraries of data and checkpoints
    began = time.monotonic()
    config = blip2_lang_only.get_config()
    # Evaluation is not what is measured; a step is that of the published figures.
    overrides = {'restore.steps': STEPS.value, 'restore.batch': 16, 'evaluate.questions': 50}
    config.update_from_flattened_dict(overrides)
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, name) for name in ('prepared', 'trace', 'checkpoints', 'killed')]
        for made in folders:
            made.mkdir()
        prepared, trace, checkpoints, killed = folders
        job = Job(config, prepared)
        stages.evaluate_models(job, ('dense', 'pruned'))
        print(f'prepared in {time.monotonic() - began:.0f} s; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}')

        print('\n| what | figure |\n|---|---|')
        restoration = Restoration(job)
        made, consumed = input_over_step(restoration)
        tell('input pipeline alone', f'{made:.0f} samples/s')
        tell('a step consumes', f'{consumed:.1f} samples/s')
        tell(f'ratio, goal {INPUT_GOAL}', f'{made / consumed:.0f}, {verdict(INPUT_GOAL, made / consumed)}')

        restoration.fit(profiling.TRACED.stop - 1, Checkpoints(trace / 'kept'), every=10**6, profile=trace)
        for name, share in shares(trace).items():
            tell(f'share of a step: {name}', f'{share:.2%}')

        with_one, without = checkpoint_seconds(restoration, checkpoints)
        step_s = np.mean(without[:, 0]) / EVERY.value
        tell('a step without checkpoints', f'{step_s:.2f} s')
        for column, kind in enumerate(('s', 'CPU s')):
            of_kind = with_one[:, column], without[:, column]
            cost, step = np.mean(of_kind[0]) - np.mean(of_kind[1]), np.mean(of_kind[1]) / EVERY.value
            error = np.sqrt(sum(np.var(blocks, ddof=1) / len(blocks) for blocks in of_kind))
            tell('a checkpoint', f'{cost:.3f} {kind} (standard error {error:.3f})')
            for every, how in ((EVERY.value, 'measured'), (config.restore.checkpoint_every, 'by the same cost')):
                share, unsure = cost / (every * step), error / (every * step)
                told = f'{share:.2%} (+- {unsure:.2%}), {how}, {verdict(share, CHECKPOINT_GOAL, unsure)}'
                tell(f'checkpoints every {every} steps, in {kind}, share, goal {CHECKPOINT_GOAL:.0%}', told)
        del restoration, job

        parts = goodput(prepared, killed, overrides, step_s)
        wall = sum(parts.values())
        tell(f'{STEPS.value} steps, killed {KILLS.value} times', f'{wall:.0f} s')
        for name, taken in parts.items():
            tell(f'of these: {name}', f'{taken:.1f} s, {taken / wall:.1%}')
    print(f'\nall of it took {time.monotonic() - began:.0f} s; load at the end {os.getloadavg()[0]:.1f}')


if __name__ == '__main__':
    app.run(main)
