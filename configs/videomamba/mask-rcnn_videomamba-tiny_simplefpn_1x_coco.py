_base_ = [
    '../_base_/models/mask-rcnn_vim_simplefpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x_adamw.py',
    '../_base_/default_runtime_mmdet.py',
]

model = dict(
    backbone=dict(
        type='mmvim.VideoMamba',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
            'videomamba_t16_in1k_res224.pth',
        ),
    )
)
