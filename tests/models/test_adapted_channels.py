"""Checkpoints of three-channel images in models of other images."""

import pytest
import torch

from mmvim.models import MambaVision, VideoMamba, Vim, VMamba

SMALL = dict(embed_dims=8, depth=1, d_state=2)
STAGES = dict(depths=(1, 1, 1, 1), embed_dims=8, stem_dims=4, num_heads=(2, 2))
FAMILIES = {
    'vim': (lambda **o: Vim(SMALL, img_size=32, **o), (32, 32)),
    'mambavision': (lambda **o: MambaVision(STAGES, **o), (64, 64)),
    'vmamba': (lambda **o: VMamba(dict(depths=(1, 1, 1, 1), embed_dims=8), **o), (64, 64)),
    'videomamba': (lambda **o: VideoMamba(SMALL, img_size=32, num_frames=2, **o), (2, 32, 32)),
}


@pytest.mark.parametrize('channels', [1, 2, 3, 4, 6, 13])
@pytest.mark.parametrize('family', FAMILIES)
def test_grey_images_look_the_same(family, channels, tmp_path):
    build, size = FAMILIES[family]
    torch.manual_seed(0)
    given = build().eval()
    torch.save(given.state_dict(), tmp_path / 'x.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'))
    model = build(in_channels=channels, adapt_channels=True, init_cfg=init).eval()
    model.init_weights()
    picture = torch.randn(2, 1, *size)
    shape = (-1, channels, *([-1] * len(size)))
    if channels % 3 and channels != 1:
        # Repeated channels of unequal weight: timm's rule, checked on the first convolution.
        conv = next(
            m
            for m in model.modules()
            if hasattr(m, 'in_channels') and hasattr(m, 'stride') and hasattr(m, 'weight')
        )
        old = next(
            m
            for m in given.modules()
            if hasattr(m, 'in_channels') and hasattr(m, 'stride') and hasattr(m, 'weight')
        )
        for i in range(channels):
            expected = old.weight[:, i % 3] * 3 / channels
            torch.testing.assert_close(conv.weight[:, i], expected)
        return
    expected = given(picture.expand(-1, 3, *([-1] * len(size))))
    for a, b in zip(model(picture.expand(shape)), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_only_as_an_option(family, tmp_path):
    build, _ = FAMILIES[family]
    model = build(in_channels=4)
    with pytest.raises(
        ValueError, match=r'patch_embed.*is .*3.* there and .*4.* here.*; adapt_channels=True fits'
    ):
        model.load_state_dict(build().state_dict())
    with pytest.raises(ValueError, match='adapt_channels'):
        build(adapt_channels='yes')
    # A model's own checkpoint is left as it is.
    adapting = build(in_channels=4, adapt_channels=True)
    adapting.load_state_dict(model.state_dict())
    for (_, a), (_, b) in zip(adapting.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b)


def test_of_an_image_model_in_a_model_of_videos():
    image = VideoMamba(SMALL, img_size=32)
    video = VideoMamba(
        SMALL, img_size=32, num_frames=4, tubelet_size=2, in_channels=6, adapt_channels=True
    )
    video.load_state_dict(image.state_dict(), strict=False)
    weight = image.patch_embed.proj.weight
    given = video.patch_embed.proj.weight.sum(2)
    torch.testing.assert_close(given[:, 3:], weight / 2)
    torch.testing.assert_close(given[:, :3], weight / 2)
