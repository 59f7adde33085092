"""A trace of a few training steps by `jax.profiler`, which TensorBoard's profile plugin and XProf open."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jax

from sparselora_jax.runtime import processes

TRACED = range(3, 6)  # steps of a run, from 1: the first compiles, and whatever else is new at first is over
STEP, DATA = 'step', 'data'  # what annotations are called: of a whole step, and of waiting for its batch in there


def steps(indices: range, folder: str | Path | None) -> Iterator[int]:
    """The indices of training steps, the use of each annotated as one step.

    Python's own calls are left out: noting each down takes longer than most of them.

    Args:
      folder: those of `TRACED` are traced into `<folder>/plugins/profile`; None: none.
    """
    if folder is not None and len(indices) < TRACED.start and processes.first():
        print(f'profile: no trace, since {len(indices)} steps are left and the first {TRACED.start - 1} are not traced')
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with ExitStack() as trace:
        for number, index in enumerate(indices, start=1):
            if folder is not None and number == TRACED.start:
                trace.enter_context(jax.profiler.trace(folder, profiler_options=options))
            with jax.profiler.StepTraceAnnotation(STEP, step_num=index + 1):
                yield index
            if number + 1 == TRACED.stop:
                trace.close()
