"""VideoMamba's configs start from the weights that they name, and distil."""

import pytest
import torch
from config_harness import REPO, build_model, cut_depth
from mmengine.config import Config

from mmvim import VideoMamba

FOLDER = REPO / 'configs/videomamba'


def official_image_weights(path, arch):
    """Write a file with the keys and the wrapping of the official ImageNet checkpoints."""
    torch.manual_seed(1)
    backbone = VideoMamba(arch)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.02)
    weights = backbone.state_dict()
    head = {'head.weight': torch.randn(1000, 192), 'head.bias': torch.randn(1000)}
    torch.save({'model': {**weights, **head}}, path)
    return weights


def shallow(name):
    cfg = Config.fromfile(FOLDER / f'{name}.py')
    cut_depth(cfg.model)
    return cfg


@pytest.mark.parametrize(
    'name',
    [
        'videomamba-tiny_in1k-pre_8xb64-8x224-70e_kinetics400',
        'videomamba-tiny_in1k-pre_8xb64-16x224-35e_sthv2',
        'mask-rcnn_videomamba-tiny_simplefpn_1x_coco',
        'videomamba-tiny_upernet_8xb2-160k_ade20k-512x512',
    ],
)
def test_starts_from_image_weights(name, tmp_path):
    cfg = shallow(name)
    weights = official_image_weights(tmp_path / 'image.pth', dict(cfg.model.backbone.arch))
    assert cfg.model.backbone.init_cfg.checkpoint.endswith('/videomamba_t16_in1k_res224.pth')
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / 'image.pth')
    model = build_model(cfg)
    model.init_weights()
    own = model.backbone.state_dict()
    video = 'x224' in name
    for key, value in weights.items():
        if key == 'patch_embed.proj.weight' and video:
            # A tubelet of one frame: the image's kernel itself.
            value = value.unsqueeze(2)
        if key in own and (video or key != 'pos_embed'):
            torch.testing.assert_close(own[key], value, msg=key)
    assert ('temporal_pos_embedding' in own) is video
    if video:
        frames = 16 if '16x224' in name else 8
        assert own['temporal_pos_embedding'].shape == (1, frames, 192)
        assert own['temporal_pos_embedding'].eq(0).all()


def test_inflation_of_longer_tubelets(tmp_path):
    cfg = shallow('videomamba-tiny_in1k-pre_8xb64-8x224-70e_kinetics400')
    weights = official_image_weights(tmp_path / 'image.pth', dict(cfg.model.backbone.arch))
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / 'image.pth')
    cfg.model.backbone.tubelet_size = 2
    for inflation, parts in (('center', (0, 1)), ('average', (0.5, 0.5))):
        cfg.model.backbone.inflation = inflation
        model = build_model(cfg)
        model.init_weights()
        kernel = model.backbone.patch_embed.proj.weight
        for frame, part in enumerate(parts):
            expected = weights['patch_embed.proj.weight'] * part
            torch.testing.assert_close(kernel[:, :, frame].detach(), expected)


def test_a_still_video_of_an_inflated_model_is_the_image():
    """With one frame and no temporal position the video model computes the image model."""
    torch.manual_seed(0)
    arch = {'embed_dims': 32, 'depth': 2}
    image = VideoMamba(arch, img_size=32).eval()
    video = VideoMamba(arch, img_size=32, num_frames=1).eval()
    video.load_state_dict(image.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(video(x.unsqueeze(2))[0], image(x)[0])


def small_distiller(**changes):
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    common = dict(type='mmvim.VideoMamba', img_size=32, out_type='raw')
    options = dict(
        type='mmvim.SelfDistillClassifier',
        data_preprocessor=dict(num_classes=5, mean=[0.0] * 3, std=[1.0] * 3),
        backbone=dict(common, arch=dict(embed_dims=32, depth=2)),
        teacher=dict(common, arch=dict(embed_dims=16, depth=2)),
        head=dict(
            type='LinearClsHead', num_classes=5, in_channels=32, loss=dict(type='CrossEntropyLoss')
        ),
    )
    return MODELS.build({**options, **changes})


def samples(count=2):
    from mmpretrain.structures import DataSample

    return [DataSample().set_gt_label(i) for i in range(count)]


def test_distillation_loss():
    model = small_distiller(distill_weight=2.0)
    x = torch.randn(2, 3, 32, 32)
    losses = model(x, samples(), mode='loss')
    tokens, target = model.backbone(x)[0], model.teacher(x)[0]
    student = model.distill_head(tokens)
    student = student / student.norm(dim=-1, keepdim=True)
    target = target / target.norm(dim=-1, keepdim=True)
    expected = 2.0 * (student - target).square().sum(-1).mean()
    torch.testing.assert_close(losses['loss_distill'], expected)
    logits = model.head.fc(tokens[:, 0])
    torch.testing.assert_close(
        losses['loss'], torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    )
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())


def test_the_teacher_is_no_part_of_the_model(tmp_path):
    model = small_distiller().train()
    assert not model.teacher.training
    assert not any('teacher' in name for name in model.state_dict())
    teacher = set(map(id, model.teacher.parameters()))
    assert not teacher & set(map(id, model.parameters()))
    assert model.double().teacher.pos_embed.dtype == torch.float64
    plain = small_distiller().backbone
    plain.load_state_dict(
        {k[9:]: v for k, v in model.state_dict().items() if k.startswith('backbone.')}
    )
    weights = VideoMamba({'embed_dims': 16, 'depth': 2}, img_size=32).state_dict()
    torch.save({'model': weights}, tmp_path / 'teacher.pth')
    common = dict(type='mmvim.VideoMamba', img_size=32, out_type='raw')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'teacher.pth'))
    model = small_distiller(teacher=dict(common, arch=dict(embed_dims=16, depth=2), init_cfg=init))
    model.init_weights()
    torch.testing.assert_close(model.teacher.pos_embed, weights['pos_embed'])


@pytest.mark.parametrize('with_head', [True, False])
def test_distilled_file(with_head):
    """Official files may hold the distillation head, which only training needs."""
    source, model = small_distiller(), small_distiller()
    torch.nn.init.normal_(source.distill_head[1].weight)
    weights = {
        k.removeprefix('backbone.').replace('head.fc.', 'head.'): v.clone()
        for k, v in source.state_dict().items()
        if with_head or not k.startswith('distill_head.')
    }
    own = model.distill_head[1].weight.clone()
    assert not any(model.load_state_dict({'model': weights}, strict=True))
    expected = source.distill_head[1].weight if with_head else own
    torch.testing.assert_close(model.distill_head[1].weight, expected)
    torch.testing.assert_close(model.head.fc.weight, source.head.fc.weight)
    torch.testing.assert_close(model.backbone.pos_embed, source.backbone.pos_embed)


def test_distillation_learns():
    model = small_distiller().train()
    x = torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = []
    for _ in range(30):
        loss = model(x, samples(4), mode='loss')['loss_distill']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]


def test_distillation_predicts_and_says_what_is_wrong():
    model = small_distiller().eval()
    (sample,) = model.test_step({'inputs': torch.zeros(1, 3, 32, 32), 'data_samples': samples(1)})
    assert sample.pred_score.shape == (5,)
    assert model.extract_feat(torch.zeros(1, 3, 32, 32), 'backbone')[0].shape == (1, 5, 32)
    assert model.extract_feat(torch.zeros(1, 3, 32, 32), 'pre_logits').shape == (1, 32)
    common = dict(type='mmvim.VideoMamba', arch=dict(embed_dims=16, depth=2))
    with pytest.raises(ValueError, match="teacher must have out_type='raw'"):
        small_distiller(teacher=dict(common, img_size=32))
    with pytest.raises(ValueError, match='distill_weight=0'):
        small_distiller(distill_weight=0)
    coarse = dict(common, img_size=32, patch_size=32, out_type='raw')
    with pytest.raises(ValueError, match='5 tokens and the teacher 2'):
        small_distiller(teacher=coarse)(torch.zeros(2, 3, 32, 32), samples(), mode='loss')


def test_reads_official_video_weights(tmp_path):
    """They are plain, and of another number of frames as well."""
    from mmengine.runner import load_checkpoint

    cfg = shallow('videomamba-tiny_in1k-pre_8xb64-16x224-70e_kinetics400')
    torch.manual_seed(1)
    backbone = VideoMamba(dict(cfg.model.backbone.arch), num_frames=8)
    torch.nn.init.normal_(backbone.temporal_pos_embedding)
    weights = backbone.state_dict()
    weights['head.weight'], weights['head.bias'] = torch.randn(400, 192), torch.randn(400)
    torch.save(weights, tmp_path / 'official.pth')
    model = build_model(cfg)
    load_checkpoint(model, str(tmp_path / 'official.pth'), map_location='cpu', strict=True)
    own = model.state_dict()
    torch.testing.assert_close(own['head.fc.weight'], weights['head.weight'])
    torch.testing.assert_close(
        own['backbone.layers.1.mixer.A_b_log'], weights['layers.1.mixer.A_b_log']
    )
    table = torch.nn.functional.interpolate(
        weights['temporal_pos_embedding'].transpose(1, 2), size=16, mode='linear'
    )
    torch.testing.assert_close(own['backbone.temporal_pos_embedding'], table.transpose(1, 2))
