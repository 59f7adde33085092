"""Merges what a workdir's restoration has learnt and exports it, once `train.py` has restored it there.

python launch/export.py --config=configs/blip2_lang_only.py --workdir=runs/demo
"""

import cli

from sparselora_jax import stages
from sparselora_jax.job import Job

CONFIG, WORKDIR = cli.define_config()


def main(argv):
    """The stage `export`."""
    del argv
    job = Job(CONFIG.value, WORKDIR.value)
    print(stages.export(job))
    print(f'exported: {job.workdir}/exported/')


if __name__ == '__main__':
    cli.run(main)
