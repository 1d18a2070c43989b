"""Scripts that show a failure of a norm."""

import contextlib
import io
from typing import Any

from bn_lightning.norms import registry
from bn_lightning.norms.check.findings import Finding, Property
from bn_lightning.norms.check.subject import Builder, Case
from bn_lightning.norms.convert import TORCH


def script(found: Property, finding: Finding, build: Builder) -> str:
    """Return a script of at most 15 lines that raises an error if the property does not hold.

    Its layer has random parameters, and its input has the shape and dtype with which the
    failure was seen. It needs PyTorch and the norm only. If such a script does not show the
    failure, because it has other random values, the script calls this package.
    """
    statement, name = _import(build)
    if finding.case is not None:
        text = _with_pytorch(found, finding.case, build.norm_args, statement, name)
        if found.script and _raises(text):
            return text
    arguments = f", norm_args={build.norm_args}" if build.norm_args else ""
    return "\n".join(
        [
            "from bn_lightning.norms.check.examination import examine",
            statement,
            f"for finding in examine({name}, names=[{found.name!r}], identical=True{arguments}):",
            "    print(finding)",
            "    assert finding.verdict not in ('FAIL', 'DIFFERS'), finding.note",
        ]
    )


def _with_pytorch(
    found: Property, case: Case, norm_args: dict[str, Any], statement: str, name: str
) -> str:
    num_dims, features = case.kind.num_dims, case.kind.features
    arguments: dict[str, Any] = {"num_features": features, "num_dims": num_dims} | norm_args
    passed = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    lines = [
        "import copy, torch",
        "from torch.testing import assert_close",
        statement,
        "torch.manual_seed(0)",
        f"make = lambda **arguments: {name}({passed}, **arguments).to({case.dtype})",
        "layer = make()",
        "[torch.nn.init.uniform_(p, 0.5, 1.5) for p in layer.parameters()]",
        f"x = 2 * torch.randn{case.shape}.to({case.dtype}) + 1",
    ]
    if not case.training and "reference" not in found.script:
        lines.append("layer(x + 1), layer.eval()")
    labels = enumerate(case.kind.groups.labels)
    values = {
        "AXES": tuple(d for d in range(num_dims) if d != 1),
        "STATISTICS": tuple(axis for axis, of_axis in labels if len(set(of_axis)) < len(of_axis)),
        "TORCH_CLASS": f"torch.nn.{TORCH[num_dims].__name__}({features})",
    }
    body = "\n".join(line for line in found.script.splitlines() if line)
    for token, value in values.items():
        body = body.replace(token, str(value))
    text = "\n".join([*lines, body])
    return f"# {found.question}\n{text}" if text.count("\n") < 14 else text


def _raises(text: str) -> bool:
    """Return whether a script raises an error."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(text, {"__name__": "__main__"})
    except Exception:
        return True
    return False


def _import(build: Builder) -> tuple[str, str]:
    """Return the statement that imports a norm, and the expression for it."""
    if build.name in registry.NORMS:
        return "from bn_lightning.norms.registry import NORMS", f"NORMS[{build.name!r}]"
    norm: Any = build.norm
    module, name = norm.__module__, norm.__qualname__
    if build.name.rpartition(".")[2] == name:
        # The import path that the user gave.
        module = build.name.rpartition(".")[0] or module
    return f"from {module} import {name.partition('.')[0]}", name
