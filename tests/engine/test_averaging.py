"""Moving averages of weights."""

import torch
from torch import nn

from mmvim.engine.optim.averaging import ExponentialMovingAverage


def test_warmup_forgets_the_beginning():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averages = [ExponentialMovingAverage(model, momentum=1e-3, warmup=w) for w in (True, False)]
    expected = [0.0, 0.0]
    for n in range(4):
        for i, average in enumerate(averages):
            average.update_parameters(model)
            # The first update copies.
            rate = 1 if n == 0 else max(1e-3, 9 / (10 + n)) if i == 0 else 1e-3
            expected[i] += rate * (model.weight.item() - expected[i])
        nn.init.constant_(model.weight, n + 1.0)
    for average, value in zip(averages, expected, strict=True):
        torch.testing.assert_close(average.module.weight.item(), value)
    averages[0].steps.fill_(10**6)
    assert averages[0]._momentum() == 1e-3
