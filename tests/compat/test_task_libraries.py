"""The models of mmdet, mmseg and mmpretrain train and predict on the packages that are installed.

Their own configs, cut down to a ResNet-18 with few channels and images of 96x64: one training step
that reaches every parameter, in float32 and under bfloat16 autocast, and one prediction.
"""

import numpy as np
import pytest
import torch

from mmvim import compat

pytest.importorskip('mmengine')

from mmengine.config import Config
from mmengine.registry import DefaultScope

HEIGHT, WIDTH = 64, 96
CHANNELS = 16


def library(name):
    compat.install()
    return pytest.importorskip(name)


def shrink(config, names, value=CHANNELS):
    """Set every key in ``names`` of a nested config."""
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, child in items:
        if key in names:
            config[key] = value
        elif isinstance(child, (dict, list)):
            shrink(child, names, value)


def build(config, scope):
    from mmengine.registry import MODELS

    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config)
        model.init_weights()
    return model


def detector(name):
    library('mmdet')
    from mmengine.hub import get_config

    config = get_config(f'mmdet::_base_/models/{name}.py').model
    for part in (config.neck, config.get('rpn_head'), config.get('bbox_head')):
        shrink(part or {}, ('out_channels', 'in_channels', 'feat_channels'))
    if 'roi_head' in config:
        shrink(config.roi_head, ('out_channels', 'in_channels', 'conv_out_channels'))
        shrink(config.roi_head, ('fc_out_channels',), 32)
        shrink(config.roi_head, ('num_classes',), 5)
        config.test_cfg.rcnn.update(score_thr=0.0, max_per_img=7)
    else:
        config.bbox_head.num_classes = 5
        config.test_cfg.update(score_thr=0.0, max_per_img=7)
    config.backbone.update(depth=18, init_cfg=None, frozen_stages=-1)
    config.neck.in_channels = [64, 128, 256, 512]
    return build(config, 'mmdet')


def detection_data(masks):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for _ in range(2):
        inputs.append(torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=generator).byte())
        instances = InstanceData(
            bboxes=torch.tensor([[8.0, 8.0, 56.0, 40.0], [40.0, 20.0, 90.0, 60.0]]),
            labels=torch.tensor([1, 3]),
        )
        if masks:
            planes = np.zeros((2, HEIGHT, WIDTH), np.uint8)
            planes[0, 8:40, 8:56] = 1
            planes[1, 20:60, 40:90] = 1
            instances.masks = BitmapMasks(planes, HEIGHT, WIDTH)
        sample = DetDataSample(gt_instances=instances)
        sample.set_metainfo(
            {
                'img_shape': (HEIGHT, WIDTH),
                'ori_shape': (HEIGHT, WIDTH),
                'pad_shape': (HEIGHT, WIDTH),
                'scale_factor': (1.0, 1.0),
            }
        )
        samples.append(sample)
    return {'inputs': inputs, 'data_samples': samples}


def train_step(model, data, precision):
    model.train()
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
        losses = model(**model.data_preprocessor(data, True), mode='loss')
    total, log = model.parse_losses(losses)
    assert all(torch.isfinite(value).all() for value in log.values()), log
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    return log


def predict(model, data):
    model.eval()
    with torch.no_grad():
        return model.test_step(data)


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
    'name', ['retinanet_r50_fpn', 'mask-rcnn_r50_fpn', 'cascade-mask-rcnn_r50_fpn']
)
def test_detectors(name, precision):
    model = detector(name)
    masks = 'mask' in name
    log = train_step(model, detection_data(masks), precision)
    assert ('s2.loss_mask' in log) == name.startswith('cascade')
    for result in predict(model, detection_data(masks)):
        found = result.pred_instances
        assert len(found) == 7
        assert found.bboxes.shape == (7, 4)
        inside = found.bboxes.new_tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
        assert ((found.bboxes >= 0) & (found.bboxes <= inside)).all()
        assert (found.labels < 5).all()
        if masks:
            assert found.masks.shape == (7, HEIGHT, WIDTH)
            assert found.masks.dtype == torch.bool


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_segmentor(precision):
    library('mmseg')
    from mmengine.hub import get_config
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    config = get_config('mmseg::_base_/models/upernet_r50.py').model
    config.pretrained = None
    config.backbone.update(depth=18, norm_cfg={'type': 'BN'})
    config.data_preprocessor.size = (HEIGHT, WIDTH)
    for head in (config.decode_head, config.auxiliary_head):
        head.update(num_classes=5, channels=CHANNELS, norm_cfg={'type': 'BN'})
    config.decode_head.in_channels = [64, 128, 256, 512]
    config.auxiliary_head.in_channels = 256
    model = build(config, 'mmseg')

    def data():
        samples = []
        for shift in range(2):
            labels = (torch.arange(WIDTH) // 20 + shift) % 5
            sample = SegDataSample(gt_sem_seg=PixelData(data=labels.expand(1, HEIGHT, WIDTH)))
            sample.set_metainfo({'img_shape': (HEIGHT, WIDTH), 'ori_shape': (HEIGHT, WIDTH)})
            samples.append(sample)
        inputs = [torch.full((3, HEIGHT, WIDTH), 100 + shift).byte() for shift in range(2)]
        return {'inputs': inputs, 'data_samples': samples}

    log = train_step(model, data(), precision)
    assert {'decode.loss_ce', 'aux.loss_ce'} <= set(log)
    for result in predict(model, data()):
        assert result.pred_sem_seg.data.shape == (1, HEIGHT, WIDTH)


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_classifier(precision):
    library('mmpretrain')
    from mmengine.hub import get_config
    from mmpretrain.structures import DataSample

    config = get_config('mmpretrain::_base_/models/resnet18.py').model
    config.head.update(num_classes=5, topk=(1, 5))
    config.train_cfg = {
        'augments': [{'type': 'Mixup', 'alpha': 0.8}, {'type': 'CutMix', 'alpha': 1.0}]
    }
    config.head.loss = {'type': 'LabelSmoothLoss', 'label_smooth_val': 0.1, 'mode': 'original'}
    config.data_preprocessor = {
        'type': 'ClsDataPreprocessor',
        'mean': [120] * 3,
        'std': [60] * 3,
        'num_classes': 5,
        'to_onehot': True,
    }
    model = build(config, 'mmpretrain')
    samples = [DataSample().set_gt_label(label) for label in (1, 4)]
    data = {'inputs': torch.full((2, 3, 32, 48), 90).byte(), 'data_samples': samples}
    train_step(model, data, precision)
    for result in predict(model, data):
        assert result.pred_score.shape == (5,)
        torch.testing.assert_close(result.pred_score.sum(), torch.tensor(1.0))


def test_configs_of_each_library_resolve():
    for module, name in (
        ('mmdet', 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'),
        ('mmseg', 'mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py'),
        ('mmpretrain', 'mmpretrain::resnet/resnet18_8xb32_in1k.py'),
    ):
        library(module)
        config = Config.fromstring(f"_base_ = '{name}'", '.py')
        assert config.model._scope_ == module
