"""Initial weights from a file."""

import pytest
import torch
from torch import nn

from bn_lightning import UserError
from bn_lightning.training import initial_weights
from tests.conftest import BRIEF, run_here, weights


def network(outputs=4):
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, outputs))


@pytest.mark.parametrize("prefix", ["", "network."])
def test_matching_tensors_are_loaded_and_all_others_are_listed(tmp_path, prefix):
    other = network(7)
    state = {f"{prefix}{name}": value for name, value in other.state_dict().items()}
    del state[f"{prefix}0.bias"]
    state[f"{prefix}extra"] = torch.zeros(2)
    torch.save({"state_dict": state, "epoch": 3} if prefix else state, tmp_path / "x.pt")
    own = network()
    bias = own[0].bias.clone()
    lines = initial_weights.load(str(tmp_path / "x.pt"), own)
    assert torch.equal(own[0].weight, other[0].weight) and torch.equal(own[0].bias, bias)
    assert lines == [
        f"6 of 9 tensors are from {tmp_path / 'x.pt'}",
        "  other shape: 2.weight (4, 5) (file: (7, 5)), 2.bias (4,) (file: (7,))",
        "  not in the file: 0.bias",
        "  not in the network: extra",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(3)}, "No tensor in .* matches the network"),
        ({"state_dict": {}}, "contains no tensors by name"),
        ([1, 2], "contains no tensors by name"),
        (None, "corrupt or is not a checkpoint"),
    ],
)
def test_a_file_without_weights_is_refused(tmp_path, content, message):
    file = tmp_path / "x.pt"
    if content is None:
        file.write_text("not a checkpoint")
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=message) as refused:
        initial_weights.load(str(file), network())
    assert len(str(refused.value).splitlines()) <= 20


def test_a_new_run_starts_from_a_file_and_a_resumed_one_does_not_need_it(trained, tmp_path):
    file = tmp_path / "start.ckpt"
    file.write_bytes((trained[0] / "checkpoints/best.ckpt").read_bytes())
    still = (*BRIEF, "--model.lr", 0, "--trainer.max_steps", 1, "--model.norm", "builtin")
    done = run_here("fit", *still, "--model.init_from", file, cwd=tmp_path)
    assert f"30 of 30 tensors are from {file}" in done.stdout
    last = tmp_path / "runs/lenet/0/checkpoints/last.ckpt"
    state = weights(last)
    assert torch.equal(state["network.conv1.weight"], weights(file)["network.conv1.weight"])
    file.unlink()
    run_here("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", 2, cwd=tmp_path)
    assert torch.load(last, weights_only=True)["hyper_parameters"]["init_from"] is None
    run_here("test", "--ckpt_path", last, cwd=tmp_path)
