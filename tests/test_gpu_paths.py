"""What runs on a GPU, on fake tensors: no tensor is on another device, and no step waits for it.

A training step waits for the GPU only if something is due: a logged loss, a monitored
step, a check of the losses, a checkpoint, the end of the epoch.
"""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from torch.testing._internal.distributed.fake_pg import FakeStore

from bn_lightning import BatchNorm, Classifier, ExactResume, FashionMNIST, NormMonitor
from bn_lightning.monitoring.progress_bar import MetricsProgressBar
from bn_lightning.norms import registry
from bn_lightning.norms.fast import Normalize
from bn_lightning.runs.records import Records
from bn_lightning.training.distributed import DistributedTraining
from tests.support.fake_cuda import CUDA, FakeGPU, fake_cuda, missing_on_mps

NUM_TRAIN, BATCH_SIZE = 550, 100  # 6 batches


class Data(FashionMNIST):
    """Fashion-MNIST with another split: the stratified split depends on the labels' values."""

    def setup(self, stage):
        self.train_indices = torch.arange(NUM_TRAIN)
        self.val_indices = torch.arange(NUM_TRAIN, NUM_TRAIN + 50)


class Steps(pl.Callback):
    """Collects what blocks the host from the start of a batch to the start of the next one."""

    def __init__(self, synchronizations):
        self.synchronizations = synchronizations
        self.blocked = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.synchronizations.lines = self.blocked[batch_idx] = []


def trained(synchronizations, folder, max_steps=-1, ckpt_path=None):
    """Train on the fake GPU with the callbacks of a run. Return the trainer and the steps."""
    with CUDA:
        model = Classifier(optimizer_args={"momentum": 0.9})
    steps = Steps(synchronizations)
    trainer = pl.Trainer(
        accelerator="cpu",  # of the machine
        strategy=FakeGPU(),
        max_epochs=1,
        max_steps=max_steps,
        log_every_n_steps=3,
        gradient_clip_val=1.0,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(folder),
        callbacks=[
            *(steps, Records(), ExactResume(), DistributedTraining(), NormMonitor()),
            *(LearningRateMonitor("step"), MetricsProgressBar()),
        ],
    )
    data = Data("sample", batch_size=BATCH_SIZE, flip=True, shift=2)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return trainer, steps


def test_the_fake_gpu_detects_what_blocks_the_host_and_other_devices():
    with fake_cuda() as synchronizations:
        x, indices = torch.zeros(3, device=CUDA), torch.zeros(3, dtype=torch.long)
        x.square_().sum()
        assert synchronizations.lines == []
        x.sum().item()
        bool(x.isfinite().all())
        x.new_tensor([1.0])
        x.cpu()
        assert len(synchronizations.lines) == 4
        for planted in (lambda: x + torch.zeros(3), lambda: x[indices], lambda: x.add_(indices)):
            with pytest.raises(RuntimeError, match="cpu"):
                planted()
        x.double().add_(1)
        assert synchronizations.float64


def test_a_training_step_blocks_the_host_only_if_something_is_due(tmp_path):
    with fake_cuda() as synchronizations:
        trainer, steps = trained(synchronizations, tmp_path, max_steps=1)
        assert any("measurements.py" in line for line in steps.blocked[0])
        last = trainer.callbacks[0].path
        trainer, steps = trained(synchronizations, tmp_path, ckpt_path=last)
        assert trainer.callbacks[0].resumed_at == [1]
        assert list(steps.blocked) == [1, 2, 3, 4, 5]
        # The loss is logged in the third step, and the last step ends the epoch.
        blocking = {batch_idx: lines for batch_idx, lines in steps.blocked.items() if lines}
        assert list(blocking) == [2, 5], blocking
        # Training and validation samples share one copy on the GPU.
        assert trainer.train_dataloader.inputs is trainer.val_dataloaders.inputs
        assert all(p.device == CUDA for p in trainer.model.parameters())
    assert missing_on_mps({*synchronizations.operations, "aten::take"}) == {"aten::take"}
    # MPS has no float64. This line is not executed there.
    assert all("float64" in line for line in synchronizations.float64)


@pytest.fixture
def fake_processes():
    """Two processes whose collectives do nothing; this is rank 0."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def inputs():
    with CUDA:
        images = torch.zeros(8, 6, 5, 5)
        return torch.zeros(8, 6), images, images.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", registry.NORMS)
def test_norms_do_not_block_the_host(norm):
    with fake_cuda() as synchronizations:
        for x in inputs():
            if norm == "instance" and x.dim() == 2:
                continue
            with CUDA:
                layer = registry.make(norm, 6, x.dim(), None)
            synchronizations.lines = []
            for mode in (True, True, False):
                y = layer.train(mode)(x)
                assert y.device == CUDA
            assert synchronizations.lines == []


def context(x, group, m):
    """Return what `Normalize.forward` keeps for its backward pass."""
    v = torch.zeros(6, device=CUDA)
    needed = (True, True, True, False, False, False, False)
    return SimpleNamespace(
        saved_tensors=(x, v, v, v), needs_input_grad=needed, m=m, eps=1e-5, group=group
    )


def test_the_gradient_does_not_block_the_host():
    with fake_cuda() as synchronizations, torch.no_grad():
        for x in inputs():
            for m in (200, None):
                gradients = Normalize.backward(context(x, None, m), x)[:3]
                assert [g.device for g in gradients] == [CUDA] * 3
        # Second derivatives.
        with torch.enable_grad():
            Normalize.backward(context(x, None, 200), x)
        assert synchronizations.lines == []


def test_synchronized_norms_do_not_block_the_host(fake_processes):
    with fake_cuda() as synchronizations:
        for x in inputs():
            layer = BatchNorm(6, device=CUDA)
            layer.sync_batchnorm = True
            synchronizations.lines = []
            assert layer(x).device == CUDA
            with torch.no_grad():
                m = torch.full((), 400.0, device=CUDA)
                gradients = Normalize.backward(context(x, fake_processes, m), x)[:3]
            assert [g.device for g in gradients] == [CUDA] * 3
            assert synchronizations.lines == []
