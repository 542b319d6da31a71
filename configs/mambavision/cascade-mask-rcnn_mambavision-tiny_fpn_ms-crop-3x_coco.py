_base_ = [
    '../_base_/models/cascade-mask-rcnn_mambavision_fpn.py',
    '../_base_/datasets/coco_instance_ms_crop.py',
    '../_base_/schedules/coco_3x_adamw.py',
    '../_base_/default_runtime_mmdet.py',
]

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/nvidia/MambaVision-T-1K/resolve/main/'
            'mambavision_tiny_1k.pth.tar',
        ),
    )
)
