"""A set of samples on the disk: drawn by several processes, resumable, scored."""
