"""Broken networks."""

import numpy as np
import torch
from broken.sound import Network
from torch import nn
from torch.nn import functional as F


class TensorStatistics(nn.Module):
    """Batch normalization whose running statistics are plain tensors."""

    def __init__(self, width):
        super().__init__()
        self.mean, self.var = torch.zeros(width), torch.ones(width)

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class PlainTensors(Network):
    def make_norm(self, width):
        return TensorStatistics(width)


class AlwaysDropout(Network):
    def features(self, x):
        return F.dropout(super().features(x), 0.2)


class LayersInList(Network):
    def __init__(self, width):
        super().__init__(width)
        self.more = [nn.Linear(30 * width, 30 * width)]

    def features(self, x):
        return F.relu(self.more[0](super().features(x)))


class Detached(Network):
    def forward(self, x):
        return self.head(self.features(x).detach())


class Unused(Network):
    def __init__(self, width):
        super().__init__(width)
        self.skip = nn.Linear(30, 5)


class OverBatch(Network):
    def forward(self, x):
        return super().forward(x).log_softmax(0)


class CountsCalls(Network):
    calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) * (1 + 0.01 * self.calls)


class OwnGenerator(Network):
    def __init__(self, width):
        super().__init__(width)
        self.generator = torch.Generator().manual_seed(0)

    def features(self, x):
        features = super().features(x)
        noise = torch.randn(features.shape, generator=self.generator)
        return features + 0.1 * noise if self.training else features


class UnseededNumpy(Network):
    def features(self, x):
        features = super().features(x)
        noise = np.random.default_rng().normal(size=features.shape)
        return features + 0.1 * torch.tensor(noise).to(features) if self.training else features


class FixedBatchSize(Network):
    def features(self, x):
        return F.relu(self.norm(self.convolution(x))).view(32 if len(x) <= 32 else 40, -1)


class Squeezed(Network):
    def forward(self, x):
        return super().forward(x).squeeze()


class FixedDtype(Network):
    def features(self, x):
        return super().features(x) @ torch.eye(180, dtype=torch.float32)


class FixedBuffer(Network):
    """Sums pairs of features in a tensor that is always float32."""

    def forward(self, x):
        features = self.head(super().features(x))
        index = torch.arange(5)
        return torch.zeros(len(x), 5).index_add_(1, index, features)


class BranchesOnValue(Network):
    def features(self, x):
        features = super().features(x)
        return features if float(features.detach().mean()) > 0.2 else 2 * features


class ChangesInput(Network):
    def forward(self, x):
        return super().forward(x.sub_(0.1))


class Half(Network):
    """The norm's sum of squares overflows in float16."""

    def features(self, x):
        features = super().features(x)
        energy = (100 * features).half().square().sum(1, keepdim=True)
        return features / (energy.float() + 1).sqrt() * energy.float() * 1e-6


class LearnsInEvaluation(nn.Module):
    """Subtract the running mean, which is updated in eval mode too."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width, 1, 1))

    def forward(self, x):
        with torch.no_grad():
            self.running_mean.lerp_(x.float().mean((0, 2, 3), keepdim=True)[0], 0.1)
        return x - self.running_mean.clone()


class UpdatesInEvaluation(Network):
    def make_norm(self, width):
        return LearnsInEvaluation(width)
