_base_ = [
    '../_base_/models/retinanet_vim_simplefpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/coco_1x_adamw.py',
    '../_base_/default_runtime_mmdet.py',
]

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/'
            'vim_t_midclstok_76p1acc.pth',
        )
    )
)
