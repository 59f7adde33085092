"""What every room stands on: processes, files, progress, errors."""
