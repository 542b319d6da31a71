_base_ = './cascade-mask-rcnn_mambavision-tiny_fpn_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(
            checkpoint='https://huggingface.co/nvidia/MambaVision-B-1K/resolve/main/'
            'mambavision_base_1k.pth.tar',
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

optim_wrapper = dict(optimizer=dict(lr=2e-4))
