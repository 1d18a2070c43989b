"""Properties of the state: sharing, restoring, copying, and conversion."""

import copy
import io
import pickle
from collections.abc import Iterator
from math import inf

import torch
from torch import Tensor, nn

from bn_lightning.norms.check import inputs
from bn_lightning.norms.check.findings import Comparison, norm_property
from bn_lightning.norms.check.subject import Case, Norm


def _continues_alike(layer: nn.Module, other: nn.Module, case: Case) -> Iterator[float]:
    """Yield differences of two layers in evaluation, in further training, and of their states."""
    for training in (False, True, True, False):
        for factor in (1.0, 1.5):
            x = factor * case.x + training
            results = []
            for module in (layer, other):
                y = module.train()(x) if training else inputs.evaluate(module, x)
                results.append(y.detach())
            yield inputs.difference(*results)
    states = [dict(module.state_dict()) for module in (layer, other)]
    yield inputs.difference(*states)


@norm_property(
    "state",
    "The layer does not change its parameters: only the optimizer does.",
    advice="A forward pass changes a parameter. Register running statistics as buffers, with "
    "self.register_buffer. An optimizer would train them.",
    script="""
before = copy.deepcopy(dict(layer.named_parameters()))
layer(x)
assert_close(dict(layer.named_parameters()), before, rtol=0, atol=0)
""",
)
def parameters_unchanged(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(batch_sizes=(12,)):
        layer = case.layer()
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        inputs.step(layer, case.x, case.gradient)
        after = dict(layer.named_parameters())
        yield Comparison(inputs.difference(after, before), 0)


@norm_property(
    "state",
    "Two layers share no parameters and no statistics.",
    advice="Training one layer changes another one. Create tensors in __init__, not in the class, "
    "in the module, or as default values of arguments.",
    script="""
layer, other = make(), make()
y = other.eval()(x)
layer.train()(x + 5)
assert_close(other.eval()(x), y)
""",
)
def layers_share_nothing(norm: Norm) -> Iterator[Comparison]:
    # A conversion to float64 would copy shared tensors.
    for case in norm.cases(dtype=torch.float32, batch_sizes=(12,)):
        one, other = case.new_layer(), case.new_layer()
        inputs.randomize_parameters(other, 1)
        other.train()(case.x - 1)
        other.train(case.training)
        before = {k: v.clone() for k, v in other.state_dict().items()}
        y = inputs.evaluate(other, case.x).clone()
        inputs.randomize_parameters(one, 2)
        one.train()
        for factor in (3, 5):
            one(factor * case.x + 4)
        yield Comparison(inputs.difference(dict(other.state_dict()), before), 0)
        yield Comparison(inputs.difference(inputs.evaluate(other, case.x), y), 0)
        # A new layer does not know what others were trained with.
        y = inputs.evaluate(case.new_layer(), case.x)
        one.train()(9 * case.x)
        yield Comparison(inputs.difference(inputs.evaluate(case.new_layer(), case.x), y), 0)


@norm_property(
    "state",
    "A layer restored from a checkpoint continues exactly like the saved one.",
    advice="The state dict lacks values that the layer uses, or loading changes them. Register "
    "statistics and counters with self.register_buffer.",
    script="""
other, _ = make(), layer.train()(x + 1)
other.load_state_dict(layer.state_dict())
for _ in range(2):
    assert_close(other.eval()(x), layer.eval()(x))
    assert_close(other.train()(x), layer.train()(x))
""",
)
def restored_layer_continues(norm: Norm) -> Iterator[Comparison]:
    arguments: list[dict[str, None]] = [{}]
    if norm.build.accepts("momentum"):
        arguments.append({"momentum": None})
    for case in norm.cases(batch_sizes=(12,)):
        for further in arguments:
            try:
                layer = case.layer(**further)
            except Exception:
                if further:
                    continue
                raise
            inputs.step(layer.train(), case.x, case.gradient)
            file = io.BytesIO()
            torch.save(layer.state_dict(), file)
            file.seek(0)
            restored = case.new_layer(**further)
            restored.load_state_dict(torch.load(file, weights_only=True))
            for error in _continues_alike(restored, layer, case):
                yield Comparison(error, 0)


@norm_property(
    "state",
    "Copies by copy.deepcopy and pickle continue like the layer, and share nothing with it.",
    advice="Remove attributes that cannot be copied, such as lambdas, open files and tensors with "
    "a graph, and references to tensors of the original.",
    script="""
layer.train()(x).square().sum().backward()
for other in (copy.deepcopy(layer), __import__("pickle").loads(__import__("pickle").dumps(layer))):
    assert_close(other.eval()(x), layer.eval()(x))
    other.train()(x + 5)
""",
)
def copies(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(batch_sizes=(12,)):
        layer = case.layer()
        inputs.step(layer.train(), case.x, case.gradient)
        layer.zero_grad()
        made = [copy.deepcopy(layer)]
        # A class inside a function cannot be pickled. That is not the layer's fault.
        if all("<locals>" not in type(module).__qualname__ for module in layer.modules()):
            made.append(pickle.loads(pickle.dumps(layer)))
        for other in made:
            untouched = copy.deepcopy(layer)
            inputs.randomize_parameters(other, 3)
            other.train()(case.x + 5)
            before = dict(untouched.state_dict())
            yield Comparison(inputs.difference(dict(layer.state_dict()), before), 0)
        for other in [copy.deepcopy(layer), *(pickle.loads(pickle.dumps(layer)) for _ in made[1:])]:
            for error in _continues_alike(other, copy.deepcopy(layer), case):
                yield Comparison(error, 0)


@norm_property(
    "state",
    "layer.to(dtype) converts the whole layer.",
    advice="A tensor of the layer stays in its dtype. Register it as a parameter or buffer.",
    script="""
other = copy.deepcopy(layer).float().double()
assert_close(other(x.double()), layer.double()(x.double()), rtol=1e-3, atol=1e-3)
""",
)
def dtype_conversion(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(dtype=torch.float32):
        layer = case.layer()
        expected = case.layer()(case.x)
        for dtype in (torch.float64, torch.bfloat16):
            other = copy.deepcopy(layer).to(dtype)
            y = other(case.x.to(dtype))
            cause = f"After the conversion to {dtype}, the output for such input has {y.dtype}."
            yield Comparison(0 if y.dtype == dtype else inf, 0, cause)
        there = copy.deepcopy(layer).double()(case.x.double())
        back = copy.deepcopy(layer).double().float()(case.x)
        for y in (there, back):
            yield Comparison(inputs.difference(y, expected), case.tolerance)


@norm_property(
    "state",
    "layer.to(device) moves the whole layer.",
    advice="A tensor stays on its device. Register it as a parameter or buffer, and create new "
    "tensors on the device of the input.",
    script="""
y = layer.to("meta")(x.to("meta"))
assert (y.device.type, y.shape) == ("meta", x.shape)
""",
)
def device_move(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(batch_sizes=(12,)):
        if torch.cuda.is_available():
            y = case.layer().cuda()(case.x.cuda()).cpu()
            yield Comparison(inputs.difference(y, case.layer()(case.x)), 1e-4)
        # Tensors on this device have a shape, but no values. Each machine has it.
        layer = case.layer().to("meta")
        try:
            y = layer(case.x.to("meta"))
        except (NotImplementedError, RuntimeError) as error:
            left = _unmoved(layer)
            cause = f"{', '.join(left)} stays on the CPU. {device_move.advice}"
            if left:
                yield Comparison(inf, 0, cause)
            if "device" in str(error):
                raise
            # The values decide what the layer does, which this device cannot show.
            continue
        is_right = (y.device.type, y.shape) == ("meta", case.shape)
        yield Comparison(0 if is_right else inf, 0)


def _unmoved(layer: nn.Module) -> list[str]:
    """Return the names of attributes of a layer on the meta device that are tensors elsewhere."""
    return [
        f"{type(module).__name__}.{name}"
        for module in layer.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.device.type != "meta" and value.numel() > 1
    ]
