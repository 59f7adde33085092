"""Traces a few training steps by `jax.profiler`, for TensorBoard's profile plugin and XProf."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jax

from sparselora_jax.runtime import processes

TRACED = range(3, 6)  # steps to trace, counted from 1: the first step compiles, and caches are warm after the second
STEP = 'step'  # annotation of a whole step
DATA = 'data'  # annotation of the wait for the batch, within a step


def steps(indices: range, folder: str | Path | None) -> Iterator[int]:
    """Yield the indices of training steps, and annotate the caller's work on each index as one step.

    Args:
      indices: indices of the remaining steps.
      folder: the trace of the `TRACED` steps is written to `<folder>/plugins/profile`; None: nothing is traced.
    """
    if folder is not None and len(indices) < TRACED.start and processes.first():
        print(f'profile: no trace, since {len(indices)} steps are left and the first {TRACED.start - 1} are not traced')
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # recording a Python call takes longer than most calls themselves
    with ExitStack() as trace:
        for number, index in enumerate(indices, start=1):
            if folder is not None and number == TRACED.start:
                trace.enter_context(jax.profiler.trace(folder, profiler_options=options))
            with jax.profiler.StepTraceAnnotation(STEP, step_num=index + 1):
                yield index
            # If the run ends earlier, leaving the `with` block closes the trace.
            if number + 1 == TRACED.stop:
                trace.close()
