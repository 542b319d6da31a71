_base_ = [
    '../_base_/models/videomamba_classifier.py',
    '../_base_/datasets/imagenet_deit_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_300e.py',
    '../_base_/default_runtime_mmpretrain.py',
]

# AutoAugment in place of RandAugment, and no repeated augmentation.
train_pipeline = _base_.train_pipeline
train_pipeline[3] = dict(
    type='AutoAugment',
    policies='imagenet',
    hparams=dict(pad_val=[round(x) for x in _base_.bgr_mean], interpolation='bicubic'),
)
train_dataloader = dict(
    batch_size=512,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(pipeline=train_pipeline),
)

optim_wrapper = dict(optimizer=dict(lr=4e-3), clip_grad=dict(max_norm=5.0))
param_scheduler = _base_.param_scheduler
param_scheduler[0]['start_factor'] = 2.5e-4
custom_hooks = []
auto_scale_lr = dict(base_batch_size=4096)
