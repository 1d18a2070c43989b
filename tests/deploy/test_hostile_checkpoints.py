"""`inspect` on files from anyone: it prints text only, in bounded memory and time."""

import json
import pickle
import sys
import warnings
import zipfile

import pytest
import torch

from bn_lightning import Classifier
from bn_lightning.deploy import content, inspection
from bn_lightning.training import checkpoints
from tests.conftest import QUICK, run_here

REFERENCE = "bn_lightning.experiment:EXPERIMENT"
# A colour, the same for terminals with 8-bit controls, another title of the window, a
# backspace, an override of the writing direction, a line break, a carriage return, a
# paragraph separator, and a lone surrogate.
NAME = "ä层\x1b[31m\x9b31m\x1b]0;x\x07\b\u202e\n\r\u2029\ud800"
ESCAPED = r"ä层\x1b[31m\x9b31m\x1b]0;x\x07\x08\u202e\n\r\u2029\ud800"


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """Lower the limits that take seconds to reach."""
    monkeypatch.setattr(content, "MAX_SIZE", 20_000)
    monkeypatch.setattr(inspection, "MAX_ROWS", 20)


def checkpoint(**entries):
    weights = {"network.fc.weight": torch.ones(2, 3), "network.norm.weight": torch.ones(3)}
    return {"state_dict": weights, "global_step": 7} | entries


def inspect(path, capsys, *flags):
    """Run `inspect`, and return what it prints."""
    inspection.main(["inspect", str(path), *flags], REFERENCE)
    out, err = capsys.readouterr()
    assert err == ""
    return out


def records(**metrics):
    return {"Records": {"epochs": [metrics], "validations": [{"step": 1} | metrics]}}


def test_names_cannot_control_the_terminal(tmp_path, capsys):
    file = tmp_path / NAME.replace("\ud800", "")
    torch.save(
        checkpoint(
            state_dict={f"network.{NAME}.{NAME}": torch.ones(3)},
            hyper_parameters={NAME: NAME, "norm": [NAME]},
            datamodule_hyper_parameters={NAME: {NAME: NAME}, "facts": {NAME: NAME}},
            data={NAME: NAME, "sha256": {NAME: NAME}},
            callbacks=records(**{NAME: 0.5}),
            between_steps={"surroundings": {NAME: NAME}},
            **{"pytorch-lightning_version": NAME},
        ),
        file,
    )
    out = inspect(file, capsys)
    assert all(char.isprintable() for line in out.split("\n") for char in line)
    assert out.count(ESCAPED) >= 12
    assert str(file).replace(NAME[:-1], ESCAPED[:-6]) in out
    printed = inspect(file, capsys, "--json")
    assert printed.isascii() and not any(ord(char) < 32 for char in printed.replace("\n", ""))
    found = json.loads(printed)
    assert list(found["layers"]) == [NAME] and found["settings"][f"model.{NAME}"] == NAME


def looped():
    inner = [1]
    inner += [inner, {"again": inner}]
    return inner


def laughs():
    """Return ten nested lists with 10**10 values, from 100 references."""
    value = ["ha"]
    for _ in range(10):
        value = [value] * 10
    return value


def nested(depth):
    value = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


def norm(values, **more):
    return {"state_dict": {"network.norm.weight": values, **more}}


HUGE = torch.ones(1).expand(10**12)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and a prototype
    QUANTIZED = torch.quantize_per_tensor(torch.ones(5), 1, 0, torch.qint8)
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
UNUSUAL = {
    "expanded": (norm(HUGE), "not shown: the file does not store a number per channel"),
    "expanded float64": (
        norm(torch.ones(1).double().expand(10**12)),
        "1,000,000,000,000 parameters",
    ),
    "meta": (norm(torch.ones(5, device="meta")), "not shown"),
    "sparse": (norm(torch.ones(5).to_sparse()), "not shown"),
    "quantized": (norm(QUANTIZED), "not shown"),
    "complex": (norm(torch.ones(5, dtype=torch.complex64)), "weight [5]"),
    "float8": (norm(torch.ones(2).to(torch.float8_e4m3fn)), "[1.00, 1.00]"),
    "scalar": (norm(torch.tensor(0.5)), "[0.50]"),
    "empty": (norm(torch.ones(0)), "weight [0]"),
    "no tensors": ({"state_dict": {}}, "0 parameters"),
    "a tensor called parameters": (norm(torch.ones(2), parameters=torch.ones(4)), "6 parameters"),
    "long name": (
        {"state_dict": {"x" * 10**6 + ".w": torch.ones(3)}},
        "xx... (1,000,000 characters)",
    ),
    "many layers": (
        {"state_dict": {f"{n}.w": torch.ones(1) for n in range(25)}},
        "... and 5 more rows",
    ),
    "nested": ({"hyper_parameters": {"a": {"b": nested(40)}}}, '"<list>"'),
    "huge integer": ({"hyper_parameters": {"a": 1 << 2_000}}, "<integer of 2,001 bits>"),
    "other objects": ({"hyper_parameters": {"a": HUGE, "b": {1}, "c": b"x"}}, '"<Tensor>"'),
    "other keys": ({"hyper_parameters": {3: 1, (1, None): 2, HUGE: 3}}, "--model.<Tensor>"),
    "non-finite metrics": ({"callbacks": records(val_acc=float("nan"))}, "acc nan"),
    "nested identity": ({"data": {"sha256": {"a": ["b", ("c",)]}}}, "['b', ('c',)]"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("flags", [(), ("--json",)])
@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_content_is_described(tmp_path, capsys, case, flags):
    given, expected = UNUSUAL[case]
    torch.save(checkpoint(**given), tmp_path / "x.ckpt")
    out = inspect(tmp_path / "x.ckpt", capsys, *flags)
    if flags:
        json.loads(out)
    else:
        assert expected in out


def is_not(name, given, expected):
    return f"{name!r} has the type {given}, not {expected}"


REFUSED = {
    "a list": ([1], "is not a dict"),
    "self-reference": (checkpoint(hyper_parameters={"a": looped()}), "more than 20,000 values"),
    "laughs": (checkpoint(data={"a": laughs()}), "more than 20,000 values"),
    "settings": (checkpoint(hyper_parameters=[1]), "'hyper_parameters' is not a dict"),
    "data settings": (
        checkpoint(datamodule_hyper_parameters="a"),
        is_not("datamodule_hyper_parameters", "str", "dict"),
    ),
    "state": (checkpoint(between_steps=None), is_not("between_steps", "NoneType", "dict")),
    "versions": (
        checkpoint(between_steps={"surroundings": 3}),
        is_not("between_steps.surroundings", "int", "dict"),
    ),
    "callbacks": (checkpoint(callbacks=[]), is_not("callbacks", "list", "dict")),
    "records": (checkpoint(callbacks={"Records": 1}), is_not("callbacks.Records", "int", "dict")),
    "validations": (
        checkpoint(callbacks={"Records": {"validations": "many"}}),
        is_not("callbacks.Records.validations", "str", "list"),
    ),
    "epochs": (checkpoint(callbacks={"Records": {"epochs": [0.5]}}), "'callbacks.Records.epochs'"),
    "metrics": (checkpoint(callbacks=records(val_acc="high")), "not a dict of numbers"),
    "metrics of huge size": (checkpoint(callbacks=records(val_acc=1 << 2_000)), "of numbers"),
    "no step": (checkpoint(callbacks={"Records": {"validations": [{}]}}), "not a dict of numbers"),
    "step": (checkpoint(global_step="7"), is_not("global_step", "str", "int")),
    "huge step": (checkpoint(global_step=1 << 2_000), is_not("global_step", "str", "int")),
    "identity": (checkpoint(data=["a"]), is_not("data", "list", "dict")),
    "identity of version 0.1.0": (checkpoint(FashionMNIST=[1]), "is not a checkpoint of a run"),
    "names": (checkpoint(state_dict={3: torch.ones(1)}), "does not contain a network: 3"),
    "no tensor": (checkpoint(state_dict={"x" * 10**6: 1}), "has the type int, not Tensor"),
    "nested tensor": (
        checkpoint(state_dict={"a": NESTED}),
        "has the type nested Tensor",
    ),
    "many values": (
        checkpoint(state_dict=dict.fromkeys([f"{n}.w" for n in range(6)], torch.ones(10**6))),
        "its norm layers have 6,000,000 values, more than 5,000,000",
    ),
    "many names": (
        checkpoint(state_dict={"x" * 5 * 2**20: torch.ones(1)}),
        "its names and settings have 5,243,",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_content_is_refused_on_one_screen(tmp_path, case):
    given, expected = REFUSED[case]
    torch.save(given, tmp_path / "x.ckpt")
    done = run_here("inspect", "x.ckpt", cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr and len(done.stderr) < 600


def rewritten(path, compression=zipfile.ZIP_STORED, pickled=None):
    """Write the parts of a checkpoint again, with another pickle in it."""
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in parts.items():
            archive.writestr(name, pickled if pickled and name.endswith("data.pkl") else value)


def test_a_file_that_unpacks_to_more_is_not_loaded(tmp_path):
    torch.save(checkpoint(more=torch.zeros(10**6)), tmp_path / "x.ckpt")
    rewritten(tmp_path / "x.ckpt", zipfile.ZIP_DEFLATED)
    bombs = {
        ("inspect", "x.ckpt"): "unpacks to 4,00",
        ("test", "--ckpt_path", "x.ckpt"): "It was not loaded",
    }
    for arguments, expected in bombs.items():
        done = run_here(*arguments, cwd=tmp_path, check=False)
        assert done.returncode == 2 and expected in done.stderr
    # Empty sets have one byte each in the file, and 216 in memory.
    for file in ("sets.ckpt", "old_format.ckpt"):
        torch.save(checkpoint(), tmp_path / file)
    sets = b"\x80\x02" + b"\x8f" * checkpoints.MAX_PICKLE + b"."
    rewritten(tmp_path / "sets.ckpt", pickled=sets)
    (tmp_path / "old_format.ckpt").write_bytes(sets)
    for file in ("sets.ckpt", "old_format.ckpt"):
        done = run_here("inspect", file, cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert "its names and settings have 4,194,307 bytes" in done.stderr


class Call:
    """An object that is pickled as the call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        function, *arguments = self.call
        return function, tuple(arguments)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit needs Linux")
def test_memory_is_limited_while_a_file_is_loaded(tmp_path):
    """torch.load calls `bytearray` with any number of bytes."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    for size, expected in ((10**10, "torch.load raised MemoryError"), (10**6, "")):
        given = checkpoint(state_dict={}, hyper_parameters={"a": Call(bytearray, size)})
        torch.save({}, tmp_path / "x.ckpt")
        rewritten(tmp_path / "x.ckpt", pickled=pickle.dumps(given, protocol=2))
        done = run_here("inspect", "x.ckpt", cwd=tmp_path, check=False)
        assert done.returncode == (2 if expected else 0) and expected in done.stderr
        assert resource.getrlimit(resource.RLIMIT_DATA) == limit


def test_names_in_messages_cannot_control_the_terminal(tmp_path, main):
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x02c\x1b[31mos\nsystem\n.")
    code, _, err = main("inspect", "x.ckpt")
    assert code == 2 and r"GLOBAL \x1b[31mos.system" in err and "\x1b" not in err
    # `fit` lists the tensors that it has not loaded.
    weights = Classifier().state_dict() | {"\x1b[31m": torch.ones(1)}
    torch.save(weights, tmp_path / "weights.pt")
    started = ("--trainer.fast_dev_run", 1, "--model.init_from", "weights.pt")
    code, out, _ = main("fit", *QUICK, *started)
    assert code == 0 and r"not in the network: \x1b[31m" in out and "\x1b" not in out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps({NAME: NAME}), rf"{ESCAPED}  {ESCAPED}"),
        ('{"a":' * 30_000 + "1" + "}" * 30_000, "result.json' is corrupt"),
        ("[" * 900 + "]" * 900, "result.json' is corrupt"),
        (json.dumps({"a": [1] * 30_000}), "more than 20,000 values"),
        (json.dumps({"a": 1})[:-1] + " " * 2**20 + "}", "is corrupt: it has 1,048,584 bytes"),
        ('{"a": ' + "1" * 5_000 + "}", "is corrupt: Exceeds the limit"),
        ('{"a": ' + "1" * 4_000 + "}", "<integer of 13,"),
        ('{"a": [1e999, NaN]}', "[inf, nan]"),
    ],
)
def test_any_result_json_is_shown_or_refused(tmp_path, text, expected):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    torch.save(checkpoint(), tmp_path / "run/checkpoints/last.ckpt")
    (tmp_path / "run/result.json").write_text(text)
    done = run_here("inspect", "--run", "run", cwd=tmp_path, check=False)
    assert done.returncode == (2 if "values" in expected or "corrupt" in expected else 0)
    assert expected in done.stdout + done.stderr
    assert "\x1b" not in done.stdout and len(done.stderr) < 600
