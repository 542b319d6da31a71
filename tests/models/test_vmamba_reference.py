"""VMamba against a plain implementation, at small sizes and at those of the released models."""

import naive_vmamba
import pytest
import torch

from mmvim.layers import SS2D
from mmvim.models import VMamba
from mmvim.models.backbones.vmamba import VSSBlock

SMALL = {'depths': (1, 1, 2, 1), 'embed_dims': 16, 'ssm_ratio': 2.0}
VANILLA = {**VMamba.arch_zoo['vanilla-tiny'], **SMALL, 'd_state': 4}


def compare(arch, size):
    torch.manual_seed(0)
    classify = VMamba(arch).eval()
    with torch.no_grad():
        for parameter in classify.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    weights = {k: v.double() for k, v in classify.state_dict().items()}
    official = {k if k[:5] != 'norm.' else f'classifier.{k}': v for k, v in weights.items()}
    channels = classify.embed_dims[-1]
    official['classifier.head.weight'] = torch.randn(10, channels).double() / channels**0.5
    official['classifier.head.bias'] = torch.randn(10).double()
    dense = VMamba(arch, out_type='featmap', out_indices=(0, 1, 2, 3), out_norm='none').eval()
    for model in (classify, dense):
        model.load_state_dict(official)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        maps, logits = naive_vmamba.forward(official, x.double(), classify.depths)
        (features,) = classify(x)
        outputs = dense(x)
    head, bias = (official[f'classifier.head.{name}'].float() for name in ('weight', 'bias'))
    for given, expected in zip((*outputs, features @ head.T + bias), (*maps, logits), strict=True):
        torch.testing.assert_close(given, expected.float(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('arch', [SMALL, VANILLA], ids=['v2', 'vanilla'])
@pytest.mark.parametrize('size', [(64, 48), (50, 35)])
def test_small(arch, size):
    compare(arch, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arch', 'size'),
    [
        ('tiny', (224, 224)), ('tiny', (1024, 800)), ('small', (224, 224)),
        ('base-s2l15', (224, 224)), ('vanilla-tiny', (224, 224)), ('vanilla-small', (500, 332)),
    ],
)  # fmt: skip
def test_full_size(arch, size):
    compare(arch, size)


def _circular(conv):
    conv.padding_mode, conv._reversed_padding_repeated_twice = 'circular', [1] * 4


def _dilated(conv):
    conv.dilation = conv.padding = (2, 2)


@pytest.mark.parametrize(
    'change',
    [
        _circular,
        _dilated,
        lambda conv: torch.nn.Conv2d(16, 16, 3, padding=1),
        lambda conv: torch.nn.Conv2d(16, 16, (3, 5), padding=(1, 2), groups=16),
        lambda conv: None,
    ],
    ids=['circular', 'dilated', 'dense', 'oblong', 'none'],
)
def test_another_convolution_is_called(change):
    """As a constructor of SS2D or a user makes it, and not as the one op of a block would."""
    torch.manual_seed(0)
    block = VSSBlock(8, SS2D(8, d_state=1), 2.0, 0.0)
    made = change(block.op.conv2d)
    if change not in (_circular, _dilated):
        block.op.conv2d = made
    x = torch.randn(1, 5, 4, 8)
    given = block(x)
    block.op.fused = False
    torch.testing.assert_close(given, block(x))


def test_without_a_convolution():
    x = torch.randn(1, 5, 4, 8)
    assert VSSBlock(8, SS2D(8, d_conv=1), 2.0, 0.0)(x).shape == x.shape
    assert VMamba({**SMALL, 'd_conv': 1})(torch.randn(1, 3, 32, 32))[0].shape == (1, 128)


def test_a_stem_of_patches_needs_one():
    with pytest.raises(ValueError, match='at least 4x4 pixels'):
        VMamba(VANILLA)(torch.randn(1, 3, 3, 9))
