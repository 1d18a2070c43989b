"""The mutants of correct layers, and how many of them `check` catches.

`tests/benchmarks/mutants.py` examines all of them.
"""

import os
import random
import select
import time

import pytest
import torch

from bn_lightning.norms.check.examination import Examination, choose, prepare
from tests.norms.check.test_correct_norms import NAMES
from tests.support.equivalent_mutants import EQUIVALENT
from tests.support.mutant_examination import ALL, CHECKS, IDENTICAL, Outcome, examine_all
from tests.support.mutants import OPERATORS, mutants
from tests.support.plain_norms import BASES

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def by_name(start):
    """Return the only mutant whose name starts with a text."""
    (mutant,) = (mutant for mutant in mutants() if mutant.name.startswith(start))
    return mutant


def test_there_are_many_different_mutants():
    assert len(mutants()) > 1000
    assert len({mutant.name for mutant in mutants()}) == len(mutants())
    assert len({(mutant.base, mutant.source) for mutant in mutants()}) == len(mutants())
    assert {mutant.base for mutant in mutants()} == BASES.keys()
    assert {mutant.operator for mutant in mutants()} == OPERATORS.keys()


def test_mutants_compile_and_differ_from_their_base():
    for mutant in mutants():
        compile(mutant.source, mutant.name, "exec")
        changed = [line for line in mutant.diff.splitlines() if line[0] in "+-"]
        assert 1 <= len(changed) <= 4, mutant.name


def test_mutants_are_deterministic():
    # This calls the function without its cache.
    assert mutants.__wrapped__() == mutants()


def test_equivalent_mutants_exist():
    """Hashes of texts are random in each process, so the names do not depend on them."""
    assert EQUIVALENT.keys() <= {mutant.name for mutant in mutants()}


def test_a_mutant_behaves_as_its_diff_says():
    mutant = by_name("layer_norm.arithmetic.21:var + self.eps -> self.eps")
    assert mutant.diff.splitlines() == [
        "         var = (x - mean).square().mean(self.axes, keepdim=True)",
        "-        x_hat = (x - mean) * (var + self.eps).rsqrt()",
        "+        x_hat = (x - mean) * self.eps.rsqrt()",
        "         return (self.weight * x_hat + self.bias).to(dtype)",
    ]
    mutant = by_name(
        "layer_norm.arithmetic.22:self.weight * x_hat + self.bias -> self.weight * x_hat - "
    )
    layer = mutant.norm()(num_features=6, num_dims=2)
    base = BASES["layer_norm"](num_features=6, num_dims=2)
    for module in (layer, base):
        torch.nn.init.constant_(module.bias, 3)
    x = torch.randn(5, 6)
    # The bias is subtracted.
    torch.testing.assert_close(layer(x), base(x) - 6)
    # The base is unchanged, and a second import returns the same class.
    assert mutant.norm() is type(layer) is not type(base)


def check_by_base(norm, base):
    """Do what the name of the base says."""
    if base == "hang":
        # A process of the check, which must end too. It keeps the pipe open.
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(60)
    if base == "die":
        os._exit(1)
    return Outcome(base == "fail", base)


@needs_fork
def test_outcomes_of_children():
    read_end, write_end = os.pipe()
    layers = [(f"{base} {i}", base, object) for i in range(2) for base in ("hang", "die", "fail")]
    outcomes = dict(examine_all(layers, timeout=0.5, check=check_by_base))
    assert outcomes.keys() == {name for name, _, _ in layers}
    for name, base, _ in layers:
        expected = {
            "hang": Outcome(True, "hangs"),
            "die": Outcome(False, "The process of the check died"),
            "fail": Outcome(True, "fail"),
        }
        assert outcomes[name] == expected[base]
    # The pipe ends when no process has its other end.
    os.close(write_end)
    assert select.select([read_end], [], [], 10)[0]
    assert os.read(read_end, 1) == b""
    os.close(read_end)


@needs_fork
@pytest.mark.slow
def test_check_catches_mutants():
    """At most one of the first mutants that the benchmark examines is not caught."""
    # EQUIVALENT does not change which mutants are drawn.
    first = random.Random(0).sample(mutants(), 300)[:15]
    chosen = [mutant for mutant in first if mutant.name not in EQUIVALENT]
    outcomes = dict(examine_all((mutant.name, mutant.base, mutant.norm()) for mutant in chosen))
    not_caught = {name: outcome.note for name, outcome in outcomes.items() if not outcome.caught}
    assert len(outcomes) == len(chosen) > 10
    assert len(not_caught) <= 1, not_caught


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_check_passes_a_base(name):
    arguments = CHECKS.get(name, [ALL])[0]
    norm = prepare(BASES[name], name, num_dims=arguments["num_dims"])
    properties = [p for p in choose(NAMES) if name in IDENTICAL or p.section != "identity"]
    examination = Examination(norm, name in IDENTICAL, [p.name for p in properties])
    assert examination.passed(list(examination.run()))
