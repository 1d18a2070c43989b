"""The GPUs of this machine."""

import os

import torch

# CUDA reads this variable when it is initialized; ROCm reads it too.
VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[str]:
    """Return the GPUs that this process may use, each as a value of `VARIABLE`."""
    count = torch.cuda.device_count()
    given = os.environ.get(VARIABLE)
    names = given.split(",") if given else map(str, range(count))
    return [name.strip() for name in names][:count]
