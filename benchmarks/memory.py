"""The peak memory of a part of a process (Linux); needs nothing but Python, so that any environment can import it."""

from pathlib import Path


class PeakMemory:
    """Count from when it is made; what was held then is `loaded`. In bytes, resident."""

    def __init__(self):
        """Set the kernel's own high-water mark back to what is resident now."""
        Path('/proc/self/clear_refs').write_text('5')
        self.loaded = _status('VmRSS')

    def peak(self) -> int:
        """The most that was resident at once since then."""
        return _status('VmHWM')


def _status(name: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f'{name}:'))
