"""Many runs: `compare` and `sweep`, their worker processes, statistics and plots."""
