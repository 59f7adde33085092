"""Presets of hardware, `hardware=<name>` in a config's argument: dtype of the base weights, mesh of devices."""

PRESETS = {
    'cpu': {'dtype': 'float32', 'mesh': {'data': 1, 'fsdp': 1, 'tensor': 1}},
    'gpu': {'dtype': 'bfloat16', 'mesh': {'data': 1, 'fsdp': 1, 'tensor': 1}},
    '8gpu': {'dtype': 'bfloat16', 'mesh': {'data': 1, 'fsdp': 8, 'tensor': 1}},
    'v5e-4': {'dtype': 'bfloat16', 'mesh': {'data': 1, 'fsdp': 4, 'tensor': 1}},
    'v5e-8': {'dtype': 'bfloat16', 'mesh': {'data': 1, 'fsdp': 8, 'tensor': 1}},
}
