"""What makes it fast: layers, distributions, mathematics, the scan, CUDA graphs and the optimizers."""
