from types import SimpleNamespace

import pytest
import torch

from mmvim.models.streaming import StreamingVideoMamba, VideoMambaEncoder, build_videomamba


def config(**changes):
    options = dict(
        img_size=8, patch_size=4, depth=2, embed_dim=16, channels=3, drop_path_rate=0.0,
        ssm_cfg={'d_state': 4}, norm_epsilon=1e-5, fused_add_norm=True, rms_norm=True,
        residual_in_fp32=True, bimamba=False, pool_type='avg', kernel_size=1, num_frames=8,
        use_checkpoint=False, checkpoint_num=0, pretrained=None,
    )  # fmt: skip
    options.update(changes)
    return SimpleNamespace(vision_encoder=SimpleNamespace(**options))


def build(add_pool_norm=True, **changes):
    torch.manual_seed(0)
    model = build_videomamba(config(**changes), add_pool_norm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


def video(frames=8):
    torch.manual_seed(1)
    return torch.randn(2, 3, frames, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize('tubelet', [1, 2])
def test_chunks_equal_the_whole(tubelet):
    model = build(kernel_size=tubelet)
    x = video()
    with torch.no_grad():
        vis, pooled = model(x)
        state = model.init_state(2, dtype=x.dtype)
        assert state[0][0].shape == (2, 32, 3)
        assert state[0][1].shape == (2, 32, 4)
        first = state[0][1].clone()
        pieces, start = [], 0
        for size in (2, 4, 2):
            part, part_pool, state = model(
                x[:, :, start : start + size],
                ssm_state=state,
                temporal_pos_offset=start // tubelet,
            )
            torch.testing.assert_close(part_pool, model.pool_norm(part.mean(1, keepdim=True)))
            pieces.append(part)
            start += size
    assert torch.equal(first, torch.zeros_like(first))
    assert isinstance(state, list)
    torch.testing.assert_close(torch.cat(pieces, 1), vis, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pooled, model.pool_norm(vis.mean(1, keepdim=True)))


@pytest.mark.parametrize('bimamba', [False, True])
def test_outputs(bimamba):
    x = video()
    plain = build(add_pool_norm=False, bimamba=bimamba)
    vis = plain(x)
    assert vis.shape == (2, 8 * 4 + 1, 16)
    torch.testing.assert_close(plain.forward_features(x), vis)
    if bimamba:
        return
    vis, state = plain(x, ssm_state=plain.init_state(2, dtype=x.dtype))
    assert len(state) == 2
    vis, state = plain.forward_features(x[:, :, :2], ssm_state=state, temporal_pos_offset=6)
    assert vis.shape == (2, 2 * 4, 16)


@pytest.mark.parametrize('keep_temporal', [False, True])
@pytest.mark.parametrize('pool_type', ['cls', 'avg', 'cls+avg', 'cls_cat_avg'])
def test_pools(pool_type, keep_temporal):
    model = build(pool_type=pool_type, bimamba=True)
    x = video()
    with torch.no_grad():
        features = model.forward_features(x)
        vis, pooled = model(x, keep_temporal=keep_temporal)
    token, rest = features[:, :1], features[:, 1:]
    torch.testing.assert_close(vis, rest)
    mean = rest.unflatten(1, (8, 4)).mean(2) if keep_temporal else rest.mean(1, keepdim=True)
    expected = {
        'cls': token,
        'avg': mean,
        'cls+avg': token + mean,
        'cls_cat_avg': torch.cat((token, mean), 1),
    }[pool_type]
    torch.testing.assert_close(pooled, model.pool_norm(expected))


def test_image():
    model = build(bimamba=True)
    x = video(1)
    features = model.forward_features(x, use_image=True)
    with torch.no_grad():
        model.backbone.temporal_pos_embedding.zero_()
    torch.testing.assert_close(model.forward_features(x), features)
    with pytest.raises(ValueError, match='use_image=True with 8 frames'):
        model(video(), use_image=True)


def test_reads_official_keys(tmp_path):
    model = build(bimamba=True)
    official = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix('backbone.')
        official['vision_encoder.' + name.replace('norm_f.', 'norm.')] = value
    # The other parts of the official multimodal model.
    for name in (
        'vision_encoder.clip_decoder.0.head.weight', 'clip_teacher.proj', 'itm_head.weight', 'temp',
        'text_encoder.bert.pooler.dense.weight', 'text_proj.weight', 'vision_proj.bias',
    ):  # fmt: skip
        official[name] = torch.zeros(3)
    torch.save({'model': official}, tmp_path / 'weights.pth')
    path = str(tmp_path / 'weights.pth')
    found = build_videomamba(config(bimamba=True, pretrained=path, ckpt_num_frame=8)).double()
    own = {n: v for n, v in found.state_dict().items() if v.dtype == torch.float64}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(own[name], value.float().double(), msg=name)
    longer = build_videomamba(
        config(bimamba=True, pretrained=path, ckpt_num_frame=8, num_frames=16)
    )
    assert longer.backbone.temporal_pos_embedding.shape[1] == 16
    with pytest.raises(ValueError, match='pretrained needs ckpt_num_frame'):
        build_videomamba(config(bimamba=True, pretrained=path))
    with pytest.raises(ValueError, match='ckpt_num_frame=4 means 4 temporal positions'):
        build_videomamba(config(bimamba=True, pretrained=path, ckpt_num_frame=4))
    with pytest.raises(ValueError, match="bimamba is 'v2'"):
        build_videomamba(config(bimamba=False, pretrained=path, ckpt_num_frame=8))


def test_errors():
    model = build()
    x = video()
    state = model.init_state(2, dtype=x.dtype)
    with pytest.raises(ValueError, match='mask must be None'):
        model(x, mask=torch.ones(2, 32))
    with pytest.raises(ValueError, match='temporal_pos_offset=-1'):
        model(x, ssm_state=state, temporal_pos_offset=-1)
    with pytest.raises(ValueError, match='needs ssm_state'):
        model(x, temporal_pos_offset=2)
    with pytest.raises(ValueError, match='a list of 2 states'):
        model(x, ssm_state=state[:1])
    with pytest.raises(ValueError, match='chunk is 1 streams'):
        model(x[:1], ssm_state=state)
    with pytest.raises(ValueError, match='beyond max_frames=8'):
        model(x, ssm_state=state, temporal_pos_offset=4)
    with pytest.raises(ValueError, match='sees nothing of the video'):
        build(pool_type='cls')(x)
    both = build(bimamba=True)
    with pytest.raises(ValueError, match='has no states'):
        both.init_state(2)
    with pytest.raises(ValueError, match='has no states'):
        both(x, ssm_state=state)
    broken = config()
    del broken.vision_encoder.embed_dim
    with pytest.raises(ValueError, match='lacks embed_dim'):
        build_videomamba(broken)
    with pytest.raises(ValueError, match=r"unknown keys \['depht'\]"):
        build_videomamba(config(depht=3))


def test_mappings_and_names():
    model = build_videomamba({'vision_encoder': vars(config().vision_encoder)})
    assert isinstance(model, VideoMambaEncoder)
    assert isinstance(model.backbone, StreamingVideoMamba)
    assert model.patch_embed.tubelet_size == 1
    assert model.no_weight_decay() == {
        'backbone.cls_token', 'backbone.pos_embed', 'backbone.temporal_pos_embedding'
    }  # fmt: skip
