"""Read and write files: atomic writes, archives, JSON, JSON Lines, prefetching."""
