"""Tasks: loss, metrics and reports of a run."""
