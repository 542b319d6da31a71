_base_ = [
    '../_base_/models/videomamba_video.py',
    '../_base_/datasets/sthv2.py',
    '../_base_/schedules/video_bs512_adamw_70e.py',
    '../_base_/default_runtime_mmpretrain.py',
]

model = dict(
    data_preprocessor=dict(num_classes=174),
    backbone=dict(
        arch='middle',
        drop_path_rate=0.8,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
            'videomamba_m16_in1k_res224.pth',
        ),
    ),
    head=dict(in_channels=576, num_classes=174),
)
train_dataloader = dict(batch_size=32)

optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
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
param_scheduler[0]['start_factor'] = 2.5e-3
param_scheduler[1].update(eta_min_ratio=2.5e-3, end=30)
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=256)
