"""Run the main job: evaluate, prune, restore, merge, verify, export, report; a rerun skips finished stages.

python launch/train.py --config=configs/blip2_lang_only.py --workdir=runs/demo
python launch/train.py --config=configs/blip2_both.py:pattern=4:8 --config.restore.steps=300 --dry_run
"""

import cli

from sparselora_jax.jobs import export, names, report, resources, stages
from sparselora_jax.jobs.job import Job
from sparselora_jax.runtime import processes

CONFIG, WORKDIR = cli.define_config()
DRY_RUN = cli.define_dry_run()


def main(argv: list[str]) -> None:
    """Run every stage in order."""
    del argv
    if DRY_RUN.value:
        cli.dry_run(CONFIG.value, WORKDIR.value, resources.ALL_STAGES)
        return
    job = Job(CONFIG.value, WORKDIR.value)
    if processes.agreed(lambda: job.read_result(names.EXPORT)) is None:
        resources.check_job(job)
    else:
        # A finished run only writes its report again, which shows records: they must be those that were answered.
        job.check()
    stages.run(job)
    # The first process writes the report, and the others wait for it.
    written = processes.agreed(lambda: report.write(job))
    # All processes have the report, but only one prints it.
    if processes.first():
        print(report.summary(written))
        print(f'complete: {job.workdir}/report.html, {job.workdir}/exported/')
    export.refuse_violations(job.workdir, written['sparsity'])


if __name__ == '__main__':
    cli.run(main)
