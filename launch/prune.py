"""Calibrate and prune only: write the masks, and `pruned/`, a Hugging Face directory that torch loads too.

python launch/prune.py --config=configs/blip2_lang_only.py --workdir=runs/demo

With `--config.evaluate.tasks=NAMES`, the dense and the pruned model are scored on these tasks.
"""

import cli

from sparselora_jax.jobs import export, names, report, resources, stages
from sparselora_jax.jobs.job import Job
from sparselora_jax.runtime import processes

CONFIG, WORKDIR = cli.define_config()
DRY_RUN = cli.define_dry_run()


def main(argv: list[str]) -> None:
    """Prune, score on tasks if the recipe names some, and export."""
    del argv
    if DRY_RUN.value:
        cli.dry_run(CONFIG.value, WORKDIR.value, resources.PRUNING_ALONE)
        return
    job = Job(CONFIG.value, WORKDIR.value)
    if processes.agreed(lambda: job.read_result(names.PRUNE)) is None:
        resources.check_job(job, resources.PRUNING_ALONE)
    stages.prune(job)
    stages.score_pruned_on_tasks(job)
    pruned = export.export_pruned(job)
    if processes.first():
        for line in report.task_lines(report.compare_tasks(job.stored.results())):
            print(line)
        print(report.tower_lines(pruned['sparsity']))
        size = pruned['bytes']
        print(f'pruned: {job.workdir / names.PRUNED_MODEL}/, {size["pruned"] / 1e6:.1f} MB with its zeros')
        print(f'masks: {job.workdir / names.MASKS}, {(job.workdir / names.MASKS).stat().st_size / 1e6:.1f} MB')
    export.refuse_violations(job.workdir, pruned['sparsity'])


if __name__ == '__main__':
    cli.run(main)
