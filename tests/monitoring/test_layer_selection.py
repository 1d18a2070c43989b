"""Which layers of a large network NormMonitor monitors, and where it states this."""

import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from bn_lightning import Classifier, FashionMNIST, NormMonitor
from tests.support.logs import QUIET, MemoryLogger, events_in


class Inputs(pl.Callback):
    """Records the first input of each module in the first step, in execution order."""

    def on_train_start(self, trainer, pl_module):
        self.inputs, self.gradients = [], {}
        for name, module in pl_module.network.named_modules():
            module.register_forward_pre_hook(partial(self.before, name))

    def before(self, name, module, args):
        if isinstance(args[0], torch.Tensor):  # some layers of DenseNet get a list
            self.inputs.append((name, module, args[0].detach().clone()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, parameter in pl_module.network.named_parameters():
            layer = name.rpartition(".")[0]
            self.gradients.setdefault(layer, []).append(parameter.grad.norm().item())


def parts(logged, group):
    """Return the second part of the tags of a group, such as the names of layers."""
    return [*dict.fromkeys(name.split("/")[1] for name, _ in logged if name.startswith(group))]


ACTIVATIONS = (nn.ReLU, nn.Hardswish, nn.Hardsigmoid)
NUM_NORMS = {
    "resnet": 19,
    "torchvision.resnet18": 20,
    "torchvision.mobilenet_v3_small": 34,
    "torchvision.densenet121": 121,
}


@pytest.mark.parametrize("norm", ["custom", "builtin"])
@pytest.mark.parametrize("network", NUM_NORMS)
def test_a_selection_of_the_layers_of_a_large_network_is_monitored(tmp_path, capsys, network, norm):
    size = {"width": 4} if network == "resnet" else {}
    model = Classifier(norm, network=network, network_args=size, image_size=(32, 32), lr=0.01)
    recorder, logger = Inputs(), MemoryLogger(tmp_path)
    steps = {"max_steps": 1, "limit_val_batches": 0}
    trainer = pl.Trainer(logger=logger, callbacks=[NormMonitor(), recorder], **steps, **QUIET)
    trainer.fit(model, FashionMNIST("sample", batch_size=4, resize=32))
    logged = logger.logged
    modules = model.network.named_modules()
    norms = [name for name, module in modules if hasattr(module, "running_var")]
    assert len(norms) == NUM_NORMS[network]
    inputs = {name: x for name, _, x in recorder.inputs}

    chosen = parts(logged, "channel_0")
    assert {chosen[0], chosen[-1]} == {norms[0], norms[-1]} and len({*chosen} & {*norms}) == 10
    for name in chosen:
        x = inputs[name].double()
        mean = logged[f"channel_0/{name}/batch_mean", 0]
        assert mean == pytest.approx(x[:, 0].mean().item(), rel=1e-4, abs=1e-5)
    printed = capsys.readouterr().out
    line = f"NormMonitor monitors 10 of {len(norms)} norm layers: {', '.join(chosen)}"
    assert printed.count(line) == 1
    assert f"--trainer.callbacks.max_layers {len(norms)} " in printed

    executed = [x for _, module, x in recorder.inputs if isinstance(module, ACTIVATIONS)]
    numbers = [int(number) for number in parts(logged, "activation_input")]
    assert (len(numbers), numbers[0], numbers[-1]) == (10, 1, len(executed))
    for number in numbers:
        x, median = executed[number - 1], logged[f"activation_input/{number}/p50", 0]
        x = x.double()
        # Equal values are usual: the ground of a picture is one value. Five standard errors
        # of a sample of 4,096 values, or one value of a small layer.
        tolerance = 0.04 + 1 / x.numel()
        assert (x < median).double().mean().item() < 0.5 + tolerance
        assert (x <= median).double().mean().item() > 0.5 - tolerance

    gradients = {n: math.hypot(*norms) for n, norms in recorder.gradients.items()}
    others = [name for name in gradients if name not in norms]
    of_layers = [name for name in parts(logged, "gradient_norm") if name != "all"]
    of_others = [name for name in of_layers if name not in chosen]
    assert {*of_layers} >= {*chosen} and len(of_others) == 10
    assert (of_others[0], of_others[-1]) == (others[0], others[-1])
    for name in of_layers:
        assert logged[f"gradient_norm/{name}", 0] == pytest.approx(gradients[name], rel=1e-4)
    total = logged["gradient_norm/all", 0]
    assert total == pytest.approx(math.hypot(*gradients.values()), rel=1e-4)


def test_tensorboard_states_which_layers_are_monitored(tmp_path):
    model = Classifier(network="resnet", network_args={"depth": 8, "width": 2}, lr=0.1)
    logger = TensorBoardLogger(tmp_path)
    # Both batches are one step.
    steps = {"max_steps": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    monitor = NormMonitor(max_layers=4)
    trainer = pl.Trainer(logger=logger, callbacks=[monitor], **steps, **QUIET)
    trainer.fit(model, FashionMNIST("sample", batch_size=16))
    [text] = events_in(logger.log_dir).Tensors("monitored_layers/text_summary")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text_of(text)]
    assert rows[2:5] == [
        ["norm layers", "4 of 7", "norm, blocks.0.norm2, blocks.1.norm2, blocks.2.norm2"],
        [
            "activations",
            "4 of 7",
            "1 (relu), 3 (blocks.0.relu), 5 (blocks.1.relu), 7 (blocks.2.relu)",
        ],
        ["other layers", "4 of 8", "conv, blocks.0.conv2, blocks.2.conv1, fc"],
    ]
    assert "NormMonitor(max_layers=8)" in text_of(text)[-1]


def text_of(event):
    """Return the lines of a text in TensorBoard."""
    return event.tensor_proto.string_val[0].decode().splitlines()
