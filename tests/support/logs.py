"""What a trainer has logged, read back by tests."""

from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Settings of a Trainer that trains on the CPU and writes nothing but what it logs.
QUIET = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class MemoryLogger(CSVLogger):
    """Keeps what is logged in memory: `kept[name, step]`."""

    def __init__(self, folder):
        super().__init__(folder)
        self.kept = {}

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.kept[name, step] = value


def events_in(folder):
    """Return all that TensorBoard was given in a folder."""
    size = {"scalars": 0, "histograms": 0, "images": 0}
    return EventAccumulator(str(folder), size_guidance=size).Reload()
