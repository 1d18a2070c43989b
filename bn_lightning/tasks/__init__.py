"""What is learned: loss, metrics and what a run reports."""
