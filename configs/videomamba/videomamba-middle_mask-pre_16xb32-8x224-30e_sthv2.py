# VideoMamba-M after masked pretraining on Something-Something V2, which has no recipe here.
_base_ = './videomamba-middle_in1k-pre_8xb32-8x224-30e_sthv2.py'

model = dict(
    backbone=dict(
        drop_path_rate=0.4,
        init_cfg=dict(
            checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
            'videomamba_m16_ssv2_mask_pt_f8_res224.pth'
        ),
    )
)

train_dataloader = _base_.train_dataloader
train_dataloader['batch_size'] = 32

optim_wrapper = dict(
    optimizer=dict(lr=0.0004),
    paramwise_cfg=dict(
        custom_keys={
            'backbone.cls_token': dict(lr_mult=0.8**33),
            'backbone.pos_embed': dict(lr_mult=0.8**33),
            'backbone.patch_embed': dict(lr_mult=0.8**33),
            'backbone.patch_embed.proj.bias': dict(lr_mult=0.8**33),
        }
    ),
)
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=0.01, end=5)
param_scheduler[1].update(eta_min_ratio=0.01, begin=5, end=30)
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=512)
