"""A trace of a few training steps by `jax.profiler`, which TensorBoard's profile plugin and XProf open."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jax

from sparselora_jax.runtime import processes

TRACED = range(3, 6)  # steps of a run, from 1: the first one compiles, and caches are warm after the second
STEP = 'step'  # annotation of a whole step
DATA = 'data'  # annotation of waiting for its batch, within a step


def steps(indices: range, folder: str | Path | None) -> Iterator[int]:
    """Yield the indices of training steps, and annotate what the caller does with each as one step.

    Args:
      indices: of the steps that are left.
      folder: the steps of `TRACED` are traced into `<folder>/plugins/profile`; None: no step is.
    """
    if folder is not None and len(indices) < TRACED.start and processes.first():
        print(f'profile: no trace, since {len(indices)} steps are left and the first {TRACED.start - 1} are not traced')
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # recording a call of Python takes longer than most of them
    with ExitStack() as trace:
        for number, index in enumerate(indices, start=1):
            if folder is not None and number == TRACED.start:
                trace.enter_context(jax.profiler.trace(folder, profiler_options=options))
            with jax.profiler.StepTraceAnnotation(STEP, step_num=index + 1):
                yield index
            # A run that ends earlier closes the trace by leaving the context.
            if number + 1 == TRACED.stop:
                trace.close()
