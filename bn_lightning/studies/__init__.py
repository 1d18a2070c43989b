"""Studies of several runs: `compare`, `sweep`, worker processes, statistics and plots."""
