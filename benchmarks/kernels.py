"""x @ packed 2:4 weights against x @ dense ones: timed where there is a GPU or TPU, else compiled for them, not run.

  pip install -r requirements.txt -r benchmarks/requirements-kernels.txt   # in an environment of its own
  python benchmarks/kernels.py [--rows=1,16,64] [--shapes=4096x4096,4096x11008]

On a chip: numbers are checked, then all are timed in turn (`kernels_timed.py`). Without one the programs are compiled
for several (`kernels_gpu.py`, `kernels_tpu.py`), and their time is estimated as the largest of three terms:

- bytes: what is read and written once, over the memory's rate;
- matmul: FLOPs, zeros included (the weights are unpacked before they are multiplied; on TPUs twice as many for the
  transposed product of int4), over the rate of bf16;
- vector: of GPUs the instructions in the kernel's loop (counted in the SASS), a warp's worth each, over the four that a
  multiprocessor issues a cycle; of TPUs the bundles of the kernel's schedule, one a cycle.

A GPU's kernel is cut into programs: its matmul and vector terms are those of the multiprocessor that has most of them.
The dense product has bytes and FLOPs at full rate on all of them and no vector term, alike for `x @ W` and `g @ W.T`.
The dense TPU program is XLA's own. What XLA itself says of a TPU program (`optimal_seconds`) is no bound: several times
the bytes' time for a dense product, and negative for some programs with a Pallas kernel, then left out.

The bytes of an output tile are its weights', its rows' of x and what is written, fp32 parts of shared sums included;
beside them is their ratio to those of the same tile with dense weights. VMEM is what a TPU's kernel allocates: each
window twice, scratch, and the registers that it spills.
"""

if __name__ == '__main__':  # transformers asks a package `kernels` for its version, and may find this file instead
    from absl import app
    from kernels_tables import main

    app.run(main)
