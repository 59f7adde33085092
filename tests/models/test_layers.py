"""What the towers share, against torch where the numbers are hard."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sparselora_jax.models import layers


@pytest.mark.parametrize('mean', [0.0, 1e2, 1e4])
def test_layer_norm_of_a_mean_far_above_the_deviation_equals_torch(mean):
    rng = np.random.default_rng(0)
    x = (mean + rng.normal(size=(5, 64))).astype(np.float32)
    scale, bias = rng.normal(size=(2, 64)).astype(np.float32)
    want = torch.nn.functional.layer_norm(torch.asarray(x), [64], torch.asarray(scale), torch.asarray(bias))
    got = layers.layer_norm({'scale': jnp.asarray(scale), 'bias': jnp.asarray(bias)}, jnp.asarray(x), 1e-5)
    np.testing.assert_allclose(got, want.numpy(), atol=3e-3 if mean == 1e4 else 1e-4)
