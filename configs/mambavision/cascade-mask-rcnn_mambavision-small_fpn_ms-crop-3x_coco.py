_base_ = './cascade-mask-rcnn_mambavision-tiny_fpn_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(
            checkpoint='https://huggingface.co/nvidia/MambaVision-S-1K/resolve/main/'
            'mambavision_small_1k.pth.tar',
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
