"""Define hardware presets (`hardware=NAME` in a recipe's arguments): the dtype of the base weights and the mesh.

Weights are split along fsdp over at most 16 chips. With more chips, batches are split along data too.
`launch/compile.py` estimates the memory of a chip: v5e-16 is `--topology=v5e:4x4`, v5p-64 is `--topology=v5p:4x4x4`.
"""

from typing import Any


def _preset(dtype: str, *, data: int = 1, fsdp: int = 1) -> dict[str, Any]:
    """Return the fields of a recipe that a preset sets; no preset splits along tensor."""
    return {'dtype': dtype, 'mesh': {'data': data, 'fsdp': fsdp, 'tensor': 1}}


PRESETS = {
    'cpu': _preset('float32'),
    'gpu': _preset('bfloat16'),
    '8gpu': _preset('bfloat16', fsdp=8),
    'v5e-4': _preset('bfloat16', fsdp=4),
    'v5e-8': _preset('bfloat16', fsdp=8),
    'v5e-16': _preset('bfloat16', fsdp=16),
    'v5e-64': _preset('bfloat16', data=4, fsdp=16),
    'v5e-256': _preset('bfloat16', data=16, fsdp=16),
    'v5p-64': _preset('bfloat16', data=4, fsdp=16),
    'v6e-256': _preset('bfloat16', data=16, fsdp=16),
}
