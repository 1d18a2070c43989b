"""Settings as plain data: config.yaml can be read again."""

import pytest
import yaml

from tests.runs.test_trainer import rehearsed

CALLBACKS = {
    "Timer": ("duration", "00:01:00:00"),
    "ModelPruning": ("pruning_fn", "l1_unstructured"),
    "lightning.pytorch.callbacks.StochasticWeightAveraging": ("swa_lrs", "0.1"),
    "BackboneFinetuning": (),
    "GradientAccumulationScheduler": ("scheduling", "{0: 4, 2: 2}"),
    "ModelCheckpoint": ("train_time_interval", "00:00:10"),
    "LambdaCallback": ("on_train_start", "builtins.print"),
    "EMAWeightAveraging": ("decay", "0.9"),
    "RichProgressBar": (),
}
OTHERS = {
    "profiler": ["--trainer.profiler", "PyTorchProfiler"],
    "plugin": ["--trainer.plugins+=DoublePrecision"],
    "logger": ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"],
}


@pytest.mark.filterwarnings("error:\\s*Unable to serialize")
def test_config_yaml_of_all_callbacks_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model.norm", "builtin"]
    for name, (*value,) in CALLBACKS.items():
        flags.append(f"--trainer.callbacks+={name}")
        if value:
            flags += [f"--trainer.callbacks.{value[0]}", value[1]]
    built = rehearsed(*flags, *(flag for other in OTHERS.values() for flag in other))
    settings = built.as_plain_data(built.config.fit)
    timer, pruning, averaging, *_ = settings["trainer"]["callbacks"]
    assert timer["init_args"] == {"duration": "00:01:00:00", "interval": "step", "verbose": True}
    assert pruning["init_args"]["pruning_fn"] == "l1_unstructured"
    assert "device" not in averaging["init_args"]  # the default cannot be written

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    again = rehearsed("--config", "config.yaml")
    kinds = [[type(c) for c in run.trainer.callbacks] for run in (built, again)]
    assert kinds[0] == kinds[1]
    assert again.as_plain_data(again.config.fit) | {"config": None} == settings | {"config": None}
