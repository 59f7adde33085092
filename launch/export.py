"""Merges what a workdir's restoration has learnt and exports it, once `train.py` has restored it there.

python launch/export.py --config=configs/blip2_lang_only.py --workdir=runs/demo [--format=hf|packed|packed_int4]

`hf`: a Hugging Face directory as torch reads it, zeros included (`train.py` has made it). `packed`: without the zeros,
for `evaluate.py` and `generate.py`; `packed_int4`: the values of 2:4 kernels in four bits. See docs/formats.md.
"""

import cli
from absl import flags

from sparselora_jax import stages
from sparselora_jax.job import Job

CONFIG, WORKDIR = cli.define_config()
FORMAT = flags.DEFINE_enum('format', 'hf', ('hf', 'packed', 'packed_int4'), 'of the weights')


def main(argv):
    """The stage `export`, `packed` or `packed_int4`."""
    del argv
    job = Job(CONFIG.value, WORKDIR.value)
    if FORMAT.value == 'hf':
        print(stages.export(job))
        print(f'exported: {job.workdir}/exported/')
    else:
        print(stages.export_packed(job, four_bits=FORMAT.value == 'packed_int4'))
        print(f'exported: {job.workdir}/{FORMAT.value}/')


if __name__ == '__main__':
    cli.run(main)
