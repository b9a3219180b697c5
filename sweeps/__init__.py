"""Many runs: which there are to be, what the search knows of them, their processes, and what came of them."""
