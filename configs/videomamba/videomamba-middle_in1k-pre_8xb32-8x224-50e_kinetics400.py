_base_ = [
    '../_base_/models/videomamba_video.py',
    '../_base_/datasets/kinetics400.py',
    '../_base_/schedules/video_bs512_adamw_70e.py',
    '../_base_/default_runtime_mmpretrain.py',
]

model = dict(
    backbone=dict(
        arch='middle',
        drop_path_rate=0.8,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
            'videomamba_m16_in1k_res224.pth',
        ),
    ),
    head=dict(in_channels=576),
)
train_dataloader = dict(batch_size=32)

optim_wrapper = dict(
    optimizer=dict(lr=4e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        # The exponent of the first of 32 layers.
        custom_keys={
            'backbone.cls_token': dict(lr_mult=0.75**33),
            'backbone.pos_embed': dict(lr_mult=0.75**33),
            'backbone.patch_embed': dict(lr_mult=0.75**33),
            'backbone.patch_embed.proj.bias': dict(lr_mult=0.75**33),
        }
    ),
)
param_scheduler = _base_.param_scheduler
param_scheduler[1]['end'] = 50
train_cfg = dict(max_epochs=50)
auto_scale_lr = dict(base_batch_size=256)
