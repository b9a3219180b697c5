"""Experience: episode files, steps in memory, and how batches are sampled."""
