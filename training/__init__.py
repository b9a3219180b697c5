"""What the loop uses: configuration, logging, checkpoints, the machine."""
