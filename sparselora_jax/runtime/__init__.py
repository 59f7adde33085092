"""What every other room needs: processes, files, progress, registries, errors."""
