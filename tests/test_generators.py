"""The global random generators are restored."""

import random

import numpy as np
import pytest
import torch

from bn_lightning import generators


def draw():
    return random.random(), np.random.rand(), float(torch.rand(()))


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_unchanged_restores_all_generators(error):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    states = random.getstate(), np.random.get_state()
    expected = draw()
    torch.set_rng_state(before)
    random.setstate(states[0])
    np.random.set_state(states[1])
    try:
        with generators.unchanged():
            assert draw() == expected
            assert draw() != expected
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    assert draw() == expected
