"""Merge and export the restored model of a workdir; run `train.py` first, which restores it.

python launch/export.py --config=configs/blip2_lang_only.py --workdir=runs/demo --format=packed

Formats (docs/formats.md):

- `hf`, the default: a Hugging Face directory with dense kernels, zeros included. `train.py` writes it too.
- `packed`: kernels without their zeros.
- `packed_int4`: as `packed`, but the merged values of 2:4 kernels are rounded to four bits.
- `packed_lora`: LoRA is not merged; its factors are stored beside the packed kernels of the base (`restore.base`).

`evaluate.py` and `generate.py` read all formats. Other software reads only `hf`.
"""

import cli
from absl import flags

from sparselora_jax.jobs import export, names, report
from sparselora_jax.jobs.job import Job
from sparselora_jax.recipe import ConfigError
from sparselora_jax.runtime import processes

CONFIG, WORKDIR = cli.define_config()
FORMAT = flags.DEFINE_enum('format', 'hf', ('hf', *names.PACKED), 'format of the weights')


def main(argv: list[str]) -> None:
    """Run the stage `export`, or the export to a packed format."""
    del argv
    job = Job(CONFIG.value, WORKDIR.value)
    if processes.agreed(lambda: job.read_result(names.TRAINING['restored'])) is None:
        raise ConfigError(
            f'--workdir={job.workdir}: no restored model; first run launch/train.py with this --config and --workdir'
        )
    if FORMAT.value == 'hf':
        exported = export.export(job)
        if processes.first():
            print(report.tower_lines(exported['sparsity']))
            sizes = exported['bytes']
            print(f'weights: {sizes["dense"] / 1e6:.1f} MB dense, {sizes["exported"] / 1e6:.1f} MB with the zeros')
            print(f'exported: {job.workdir / names.EXPORTED_MODEL}/')
        export.refuse_violations(job.workdir, exported['sparsity'])
    else:
        packed = export.export_packed(job, FORMAT.value)
        if processes.first():
            print(f'weights: {packed["bytes"] / 1e6:.1f} MB')
            print(f'pruned kernels: {packed["bytes_of_dense_kernels"]:.1%} of their dense size')
            print(f'largest relative error of a kernel: {packed["largest_relative_error"]:.2g}')
            print(f'exported: {job.workdir / FORMAT.value}/')


if __name__ == '__main__':
    cli.run(main)
