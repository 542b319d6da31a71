"""Training of each family stays finite in each precision, at the recipe's learning rate and 3x it.

The models are narrow and the data are small; optimizer, weight decay, clipping and learning rate
are those of the recipes (which are for batches of 1,024 and more, so that here they are harsher).
"""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip('mmpretrain')

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from narrow import narrow_mambavision

import mmvim

CONFIGS = Path(__file__).parents[2] / 'configs'
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
FAMILIES = {
    'vim': (
        'vim/vim-tiny_8xb128_in1k.py',
        lambda: mmvim.Vim(
            arch=dict(embed_dims=24, depth=3, d_state=8),
            img_size=16,
            patch_size=4,
            drop_path_rate=0.05,
        ),
        24,
    ),
    'videomamba': (
        'videomamba/videomamba-tiny_8xb512_in1k.py',
        lambda: mmvim.VideoMamba(
            arch=dict(embed_dims=24, depth=3), img_size=16, patch_size=4, drop_path_rate=0.05
        ),
        24,
    ),
    'mambavision': (
        'mambavision/mambavision-tiny_32xb128_in1k.py',
        lambda: narrow_mambavision(drop_path_rate=0.05),
        64,
    ),
}


class Classifier(nn.Module):
    def __init__(self, backbone: nn.Module, width: int):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(width, 10)

    def forward(self, x):
        out = self.backbone(x)[-1]
        return self.head(out.flatten(2).mean(2) if out.dim() == 4 else out)


def merged(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same with one group for each setting, rather than one for each parameter: quicker."""
    groups: dict[tuple, list] = {}
    for group in optimizer.param_groups:
        groups.setdefault((group['lr'], group['weight_decay']), []).extend(group['params'])
    return type(optimizer)(
        [dict(params=p, lr=lr, weight_decay=decay) for (lr, decay), p in groups.items()],
        **{k: optimizer.defaults[k] for k in ('betas', 'eps')},
    )


def train(family: str, dtype: torch.dtype, factor: float, steps: int, device: str) -> list[float]:
    """Train with warm-up and cosine decay; return the losses."""
    config, build, width = FAMILIES[family]
    cfg = Config.fromfile(CONFIGS / config)
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = Classifier(build(), width).to(device).train()
    settings = copy.deepcopy(cfg.optim_wrapper)
    settings.type = 'OptimWrapper'
    for name in ('loss_scale', 'dtype'):
        settings.pop(name, None)
    peak = settings.optimizer.lr = settings.optimizer.lr * factor
    wrapper = build_optim_wrapper(model, settings)
    optimizer = merged(wrapper.optimizer)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    clip = (cfg.optim_wrapper.get('clip_grad') or {}).get('max_norm')
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(10, 3, 4, 4, generator=generator)
    bases = [group['lr'] / peak for group in optimizer.param_groups]
    losses = []
    for step in range(steps):
        warm = min((step + 1) / (0.05 * steps), 1.0)
        decay = 0.5 * (1 + float(torch.cos(torch.tensor(step / steps * torch.pi))))
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group['lr'] = peak * base * warm * decay
        labels = torch.randint(10, (8,), generator=generator)
        images = F.interpolate(centres[labels], 32 if family == 'mambavision' else 16)
        images = images + torch.randn(images.shape, generator=generator)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(images.to(device))
            loss = F.cross_entropy(logits.float(), labels.to(device), label_smoothing=0.1)
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    finite = torch.isfinite(losses)
    assert finite.all(), f'not finite at step {int((~finite).nonzero()[0])} of {steps}'
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    if scaler.is_enabled():
        # What overflows now and then lowers the scale; it must not have gone to nothing.
        assert scaler.get_scale() >= 1
    return losses.tolist()


def check(family: str, dtype: str, factor: float, steps: int, device: str) -> None:
    losses = train(family, DTYPES[dtype], factor, steps, device)
    n = max(steps // 20, 1)
    if factor == 1 and steps >= 1000:
        # The task is easy: what trains at all learns it.
        assert sum(losses[-n:]) < 0.8 * sum(losses[:n])


@pytest.mark.parametrize('family', FAMILIES)
def test_a_few_steps_are_finite(family, count):
    check(family, 'bf16', 3, 10, 'cpu')
    count('training steps', 10)


CASES = list(itertools.product(FAMILIES, DTYPES, (1, 3)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ('family', 'dtype', 'factor'), CASES, ids=[f'{f}-{d}-{x}x' for f, d, x in CASES]
)
def test_two_thousand_steps_are_finite(family, dtype, factor, device, count):
    check(family, dtype, factor, 2000, device)
    count('training steps', 2000)


def states(device: str) -> list[torch.Tensor]:
    torch.manual_seed(3)
    found = []
    for family in FAMILIES:
        losses = train(family, torch.float32, 1, 6, device)
        found.append(torch.tensor(losses))
    return found


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_two_runs_with_one_seed_are_equal(device, monkeypatch, count):
    """Bitwise: each loss depends on all the bits of the weights before it."""
    if device == 'cuda':
        monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    try:
        for one, two in zip(states(device), states(device), strict=True):
            assert torch.equal(one, two)
    finally:
        torch.use_deterministic_algorithms(False)
    count('training steps', 36)
