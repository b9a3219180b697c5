"""Building blocks with efficient implementations: layers, distributions, math, scan, CUDA graphs, optimizers."""
