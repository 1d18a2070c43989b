"""Properties of compiled and exported layers."""

import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.norms.check import inputs
from bn_lightning.norms.check.findings import Comparison, NotApplicable, describe, norm_property
from bn_lightning.norms.check.subject import Case, Norm

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the messages of the compilers."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@norm_property(
    "deployment",
    "torch.compile gives the same outputs, gradients and running statistics.",
    advice="Compiled and eager results differ. Compile parts of forward to find the cause: a "
    "number that changes, such as a counter in Python, becomes a constant.",
    script="""
compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager")
for part in (x, x[:1].repeat(5, *[1] * (x.dim() - 1)), x):
    assert_close(compiled(part), layer(part))
assert_close(compiled.eval()(x), layer.eval()(x))
""",
)
def compiled(norm: Norm) -> Iterator[Comparison]:
    last = list(norm.kinds)[-1]
    for case in norm.cases(batch_sizes=(12,)):
        # Each compilation takes a second.
        is_last = case.kind.num_dims == last
        if case.training or is_last:
            with _quiet():
                yield from _compare_compiled(case, "aot_eager", (12, 4) if is_last else (12,))


@norm_property(
    "deployment",
    "torch.compile with its default backend gives the same outputs and gradients.",
    advice="Compiled and eager results differ. Compile parts of forward to find the cause.",
    script="""
assert_close(torch.compile(copy.deepcopy(layer))(x), layer(x))
""",
)
def compiled_by_inductor(norm: Norm) -> Iterator[Comparison]:
    # One kind is enough, because the compilation takes seconds.
    kind = norm.one_kind
    case = norm.one_case(kind, 12, training=True, dtype=torch.float32)
    with _quiet():
        try:
            yield from _compare_compiled(case, "inductor", (12,))
        except Exception as error:
            if "InvalidCxxCompiler" in str(error):
                raise NotApplicable("torch.compile found no C++ compiler.") from error
            raise


def _compare_compiled(case: Case, backend: str, sizes: tuple[int, ...]) -> Iterator[Comparison]:
    torch.compiler.reset()
    layer, plain = case.layer(), case.layer()
    compiled_layer: Any = torch.compile(layer, backend=backend)
    tolerance = 10 * case.tolerance
    for seed, size in enumerate(sizes):
        x = inputs.batch((size, *case.shape[1:]), seed).to(case.dtype)
        g = inputs.random(x.shape, seed).to(case.dtype)
        found, expected = inputs.step(compiled_layer, x, g), inputs.step(plain, x, g)
        found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
        yield Comparison(inputs.difference(found["output"], expected["output"]), tolerance)
        error = inputs.difference(found, expected)
        if case.kind.reads_past and not error <= tolerance:
            raise NotApplicable(
                "The output of the compiled layer is right, but its gradient is wrong. In "
                "training, the layer uses running statistics that it changes, and PyTorch's "
                "compiler may read them after the change."
            )
        yield Comparison(error, tolerance)
    ys = [inputs.evaluate(module, case.x) for module in (layer, plain)]
    yield Comparison(inputs.difference(*ys), tolerance)
    torch.compiler.reset()


@norm_property(
    "deployment",
    "torch.export gives the same output in evaluation.",
    advice="The exported program differs from the layer.",
    script="""
program = torch.export.export(layer.eval(), (x,)).module()
assert_close(program(x), layer(x))
""",
)
def exported(norm: Norm) -> Iterator[Comparison]:
    for case in norm.cases(training=(False,), batch_sizes=(12,)):
        layer, x = case.layer(), case.x
        with _quiet():
            try:
                program = torch.export.export(layer, (x,)).module()
            except Exception as error:
                reason = describe(error).partition("\n")[0]
                raise NotApplicable(f"torch.export does not accept the layer: {reason}") from error
        yield Comparison(inputs.difference(program(x), case.layer()(x)), case.tolerance)


@norm_property(
    "deployment",
    "ONNX Runtime gives the same output in evaluation.",
    advice="The exported ONNX model differs from the layer.",
    script="""
import onnxruntime
torch.onnx.export(layer, (x,), "layer.onnx", dynamo=True)
session = onnxruntime.InferenceSession("layer.onnx")
(y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
assert_close(torch.from_numpy(y), layer(x), rtol=1e-3, atol=1e-3)
""",
)
def onnx(norm: Norm) -> Iterator[Comparison]:
    for package in ONNX_PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise NotApplicable(
                'ONNX is not installed: pip install "bn_lightning[onnx]"'
            ) from error
    kind = norm.one_kind
    case = norm.one_case(kind, 12, training=False, dtype=torch.float32)
    with _quiet():
        try:
            y = _run_onnx(case.layer(), case.x)
        except Exception as error:
            reason = describe(error).partition("\n")[0]
            raise NotApplicable(f"ONNX does not accept the layer: {reason}") from error
    yield Comparison(inputs.difference(y, case.layer()(case.x)), 1e-3)


def _run_onnx(layer: nn.Module, x: Tensor) -> Tensor:
    onnxruntime = importlib.import_module("onnxruntime")
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer.onnx")
        program.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        (y,) = session.run(None, {name: x.numpy()})
    return torch.from_numpy(y)
