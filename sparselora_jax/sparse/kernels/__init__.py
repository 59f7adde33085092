"""Products of packed kernels: Pallas for GPU and TPU, plain jax.numpy for everything else."""
