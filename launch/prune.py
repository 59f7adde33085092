"""Calibrate and prune only, and write the masks to the workdir.

python launch/prune.py --config=configs/blip2_lang_only.py --workdir=runs/demo
"""

import cli

from sparselora_jax.jobs import names, stages
from sparselora_jax.jobs.job import Job

CONFIG, WORKDIR = cli.define_config()


def main(argv: list[str]) -> None:
    """Run the stage `prune`."""
    del argv
    job = Job(CONFIG.value, WORKDIR.value)
    print(stages.prune(job))
    print(f'masks: {job.workdir}/{names.MASKS}')


if __name__ == '__main__':
    cli.run(main)
