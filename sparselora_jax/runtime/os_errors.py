"""Say what an operating system's error means, and what to do, without its number."""

import errno

# By the number of the error. Others are described by the operating system's own words.
MEANINGS = {
    errno.ENOENT: 'no such file or folder',
    errno.EEXIST: 'a file is in the way of this folder; name another folder',
    errno.ENOTDIR: 'a part of this path is a file, not a folder; name another folder',
    errno.EISDIR: 'a folder, expected a file',
    errno.EACCES: 'no permission; change it, or name another place',
    errno.EPERM: 'no permission; change it, or name another place',
    errno.EROFS: 'the file system is read-only; name a place elsewhere',
    errno.ENOSPC: 'the disk is full; make room, then run the same command again',
    errno.EDQUOT: 'the disk quota is used up; make room, then run the same command again',
    errno.ELOOP: 'symbolic links that lead in a circle; name another place',
    errno.ENAMETOOLONG: 'the name is too long; name a shorter one',
    errno.EMFILE: 'too many open files; raise the limit (ulimit -n)',
    errno.ENODEV: 'a device, expected a file',
    errno.ENXIO: 'a device, expected a file',
}


def describe(error: OSError) -> str:
    """Return the path, the meaning and the remedy of an error, in one line.

    Args:
      error: as Python raised it.

    >>> describe(FileExistsError(17, 'File exists', 'runs/demo'))
    'runs/demo: a file is in the way of this folder; name another folder'
    """
    meaning = MEANINGS.get(error.errno, error.strerror or str(error) or type(error).__name__)
    path = error.filename2 or error.filename
    text = meaning if path is None else f'{path}: {meaning}'
    return ' '.join(text.split())
