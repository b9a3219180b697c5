"""Sources of intrinsic reward: one file for each but Plan2Explore, which is in exploration.py with their table."""
