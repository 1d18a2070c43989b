"""Logs of a trainer, read back by tests."""

from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

# The name of an event file ends with a number, which counts the files of a process. TensorBoard
# reads files of the same second in alphabetical order: number 10 before number 9. With four digits,
# a run that is resumed within the second in which it started is read in the right order.
event_file_writer._global_uid = event_file_writer.AtomicCounter(1_000)

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
