"""Merges what a workdir's restoration has learnt and exports it, once `train.py` has restored it there.

python launch/export.py --config=configs/blip2_lang_only.py --workdir=runs/demo --format=packed

`hf` (the default): a Hugging Face directory as torch reads it, zeros included (`train.py` has made it). The others are
for `evaluate.py` and `generate.py` (docs/formats.md). `packed`: without the zeros; `packed_int4`: the merged values of
2:4 kernels rounded to four bits; `packed_lora`: nothing merged, LoRA beside the packed kernels that it was trained on
(`restore.base`).
"""

import cli
from absl import flags

from sparselora_jax.jobs import export
from sparselora_jax.jobs.job import Job

CONFIG, WORKDIR = cli.define_config()
FORMAT = flags.DEFINE_enum('format', 'hf', ('hf', *export.PACKED), 'of the weights')


def main(argv):
    """The stage `export`, or that of a packed format."""
    del argv
    job = Job(CONFIG.value, WORKDIR.value)
    if FORMAT.value == 'hf':
        print(export.export(job))
        print(f'exported: {job.workdir}/exported/')
    else:
        print(export.export_packed(job, FORMAT.value))
        print(f'exported: {job.workdir}/{FORMAT.value}/')


if __name__ == '__main__':
    cli.run(main)
