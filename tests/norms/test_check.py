"""The examination itself: sound norms pass it, and each planted bug is caught and named."""

import json
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bn_lightning.norms import registry
from bn_lightning.norms.check import properties
from tests.conftest import command

SLOW = ("torch.compile", "two processes")  # questions that take seconds
COMPILED, PROCESSES = (next(c for c in properties.CHECKS if c.question.startswith(start)) for start in SLOW)
QUICK = [c for c in properties.CHECKS if c.section != "measured" and c not in (COMPILED, PROCESSES)]


def make(name):
    return partial(properties._make, name, {})


class Plain(nn.Module):
    """Batch normalization as a tensor expression; a subclass plants a bug in one place."""

    def __init__(self, num_features, num_dims, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.shape = (1, num_features, *[1] * (num_dims - 2))
        self.axes = [d for d in range(num_dims) if d != 1]
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.hold("running_mean", torch.zeros(num_features))
        self.hold("running_var", torch.ones(num_features))
        self.hold("num_batches_tracked", torch.tensor(0))

    def hold(self, name, value):
        self.register_buffer(name, value)

    def moments(self, x):
        mean = x.mean(self.axes, keepdim=True)
        return mean, (x - mean).square().mean(self.axes, keepdim=True)

    def track(self, x, mean, var):
        m = x.numel() // x.size(1)
        self.running_mean.lerp_(mean.detach().flatten(), 0.1)
        self.running_var.lerp_(var.detach().flatten() * m / (m - 1), 0.1)
        self.num_batches_tracked += 1

    def in_eval(self, x):
        return self.running_mean.view(self.shape), self.running_var.view(self.shape)

    def forward(self, x):
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            mean, var = self.moments(x)
            self.track(x, mean, var)
        else:
            mean, var = self.in_eval(x)
        x_hat = (x - mean) / (var + self.eps).sqrt()
        return (x_hat * self.weight.view(self.shape) + self.bias.view(self.shape)).to(dtype)


class WrongAxis(Plain):
    def moments(self, x):
        self.axes = self.axes[:2]  # the width is left out
        return super().moments(x)

    def track(self, x, mean, var):
        if x.dim() == 4:
            mean, var = mean.mean(3), var.mean(3)
        super().track(x, mean, var)


class StatisticsAreNotBuffers(Plain):
    def hold(self, name, value):
        setattr(self, name, value.double() if value.is_floating_point() else value)


class EvalUsesTheBatch(Plain):
    def in_eval(self, x):
        return self.moments(x)


class MomentumTheWrongWayRound(Plain):
    def track(self, x, mean, var):
        m = x.numel() // x.size(1)
        self.running_mean.lerp_(mean.detach().flatten(), 0.9)
        self.running_var.lerp_(var.detach().flatten() * m / (m - 1), 0.9)
        self.num_batches_tracked += 1


class VarianceWithoutGradient(Plain):
    def moments(self, x):
        mean, var = super().moments(x)
        return mean, var.detach()


class MeanOfMeans(Plain):
    sync_batchnorm = False

    def moments(self, x):
        mean, var = super().moments(x)
        if self.sync_batchnorm:
            for value in (mean.detach(), var.detach()):
                dist.all_reduce(value)
                value /= dist.get_world_size()
        return mean, var


class GraphIsKept(Plain):
    def track(self, x, mean, var):
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean.flatten()


class RunningVarianceIsBiased(Plain):
    def track(self, x, mean, var):
        m = x.numel() // x.size(1)
        super().track(x, mean, var * (m - 1) / m)


class RMSNorm(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()

    def forward(self, x):
        return x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()


BUGS = {
    WrongAxis: ("output in training", "statistics over images, height; batch normalization over images, height, width"),
    StatisticsAreNotBuffers: ("its state survives a checkpoint", "register the statistics as buffers"),
    EvalUsesTheBatch: ("eval takes each image by itself", "eval uses the statistics of its batch"),
    MomentumTheWrongWayRound: ("running statistics after three steps", "momentum is the wrong way round"),
    VarianceWithoutGradient: ("its gradient is that of what it computes", "no gradient flows through the variance"),
    MeanOfMeans: (PROCESSES.question, "the mean of the processes' means"),
    GraphIsKept: ("no step hangs on the step before", "detach the batch's statistics"),
    RunningVarianceIsBiased: ("running statistics after three steps", "biased: divided by m and not by m - 1"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_and_named(bug):
    question, note = BUGS[bug]
    (check,) = (c for c in properties.CHECKS if c.question == question)
    finding = check(make(f"{__name__}.{bug.__name__}"))
    assert finding.verdict == {"property": "FAIL", "identity": "DIFFERS"}[finding.section]
    assert note in finding.note
    assert check(make(f"{__name__}.Plain")).verdict in ("pass", "same", "n/a")


def test_a_momentum_the_wrong_way_round_is_unsound_too():
    (check,) = (c for c in QUICK if "odd batch" in c.question)
    assert check(make(f"{__name__}.MomentumTheWrongWayRound")).verdict == "FAIL"


@pytest.mark.parametrize("name", ["custom", "builtin", f"{__name__}.Plain"])
def test_batch_norms_pass_everything(name):
    for check in QUICK:
        finding = check(make(name))
        assert finding.verdict in ("pass", "same"), finding


def test_the_articles_layer_has_two_weaknesses():
    findings = [check(make("article")) for check in QUICK]
    assert [(f.verdict, f.question) for f in findings if f.verdict in ("FAIL", "DIFFERS")] == [
        ("FAIL", "training is told by module.training"),
        ("DIFFERS", "running statistics after three steps"),
    ]
    assert "is_grad_enabled" in next(f.note for f in findings if f.verdict == "FAIL")
    assert "biased" in next(f.note for f in findings if f.verdict == "DIFFERS")


@pytest.mark.parametrize("name", ["group", "renorm"])
def test_a_norm_that_is_meant_to_differ_is_sound_and_not_the_same(name):
    findings = [check(make(name)) for check in QUICK]
    assert {f.verdict for f in findings if f.section == "property"} == {"pass"}
    assert "DIFFERS" in {f.verdict for f in findings if f.section == "identity"}


def test_a_norm_that_does_not_centre_is_sound():
    findings = [check(make(f"{__name__}.RMSNorm")) for check in QUICK]
    assert {f.verdict for f in findings if f.section == "property"} == {"pass", "n/a"}
    assert any("does not centre" in f.note for f in findings)


def test_no_norm_at_all_is_no_norm():
    findings = [check(make("none")) for check in QUICK]
    assert {"the scale of the input does not matter"} <= {f.question for f in findings if f.verdict == "FAIL"}


def test_every_norm_of_the_table_is_examined_here():
    assert set(registry.NORMS) == {"custom", "builtin", "article", "group", "renorm", "none"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("custom", "--identical"), 0),
        (("builtin", "--identical"), 0),
        (("article",), 1),
        (("group", "--norm_args.num_groups", "1"), 0),
    ],
)
def test_the_command(arguments, code, tmp_path):
    done = command("check", *arguments, "--json", cwd=tmp_path, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] == (code == 0)
    assert len(report["findings"]) == len(properties.CHECKS)
    if arguments[0] in ("custom", "builtin"):
        assert {f["verdict"] for f in report["findings"]} == {"pass", "same", "measured"}


def test_the_command_refuses_what_is_no_norm(main):
    code, _, error = main("check", "custm")
    assert code == 2
    assert "There is no norm 'custm'" in error
