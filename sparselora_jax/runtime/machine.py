"""Ask how much memory and disk this machine has."""

import os
import shutil
from pathlib import Path

import jax

# Where Linux states the limit of a container, by version of its control groups.
_CONTAINER_LIMITS = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')


def device_memory(devices: int) -> int:
    """Return the memory of one device in bytes.

    Args:
      devices: number of devices in use; the devices of a CPU share the memory of the machine.
    """
    device = jax.local_devices()[0]
    statistics = device.memory_stats() or {}
    if 'bytes_limit' in statistics:
        return statistics['bytes_limit']
    return machine_memory() // max(1, min(devices, jax.local_device_count()))


def machine_memory() -> int:
    """Return the memory that this process may use, in bytes: that of the machine, or of its container."""
    limits = [os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')]
    for file in map(Path, _CONTAINER_LIMITS):
        text = file.read_text().strip() if file.is_file() else ''
        # A container without a limit says 'max', or a number that is larger than any memory.
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or will be on.

    Args:
      folder: need not exist yet.
    """
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free
