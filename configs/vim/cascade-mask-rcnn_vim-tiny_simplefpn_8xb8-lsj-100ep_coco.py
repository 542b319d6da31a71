_base_ = [
    '../_base_/models/cascade-mask-rcnn_vim_simplefpn.py',
    '../_base_/datasets/coco_lsj_1024.py',
    '../_base_/schedules/coco_100ep_adamw.py',
    '../_base_/default_runtime_mmdet.py',
]

model = dict(
    # Every batch is 1024x1024, in training and in testing.
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(
        img_size=1024,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/'
            'vim_t_midclstok_76p1acc.pth',
        ),
    ),
)

default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=5000),
)
log_processor = dict(by_epoch=False)
