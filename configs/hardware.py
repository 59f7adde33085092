"""Presets of hardware, `hardware=<name>` in a config's argument: dtype of the base weights, mesh of devices.

Weights are split along fsdp over at most 16 chips; more chips take more rows, along data. `launch/compile.py` says what
a chip holds: v5e-16 is --topology=v5e:4x4, v5p-64 v5p:4x4x4.
"""


def _preset(dtype: str, *, data: int = 1, fsdp: int = 1) -> dict:
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
