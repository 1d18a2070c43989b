"""Logs of a trainer, read back by tests."""

from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Settings of a Trainer that trains on the CPU and writes nothing except logs.
QUIET = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class MemoryLogger(CSVLogger):
    """Stores metrics in memory: `logged[name, step]`."""

    def __init__(self, folder):
        super().__init__(folder)
        self.logged = {}

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.logged[name, step] = value


def events_in(folder):
    """Return all TensorBoard events in a folder."""
    size = {"scalars": 0, "histograms": 0, "images": 0}
    return EventAccumulator(str(folder), size_guidance=size).Reload()
