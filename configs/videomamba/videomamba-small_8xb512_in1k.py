_base_ = [
    '../_base_/models/videomamba_classifier.py',
    '../_base_/datasets/imagenet_deit_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_300e.py',
    '../_base_/default_runtime_mmpretrain.py',
]

model = dict(
    backbone=dict(arch='small', drop_path_rate=0.15),
    head=dict(in_channels=384),
)
train_dataloader = dict(batch_size=512)

optim_wrapper = dict(optimizer=dict(lr=4e-3, weight_decay=0.05))
param_scheduler = _base_.param_scheduler
param_scheduler[0]['start_factor'] = 2.5e-4
custom_hooks = []
auto_scale_lr = dict(base_batch_size=4096)
