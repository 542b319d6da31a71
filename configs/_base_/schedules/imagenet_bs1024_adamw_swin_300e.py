# Swin Transformer's and VMamba's ImageNet-1K schedule: AdamW, 20 epochs of warm-up from 1e-6, a
# cosine to 1e-5, 300 epochs, clipping, exponential moving average. 1e-3 is for a batch of 1024 in
# total.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    # No decay for one-dimensional parameters (norms, biases, D), state matrices, biases of Δ.
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={
            'A_log': dict(decay_mult=0.0),
            'dt_projs_bias': dict(decay_mult=0.0),
        },
    ),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=20,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=20, end=300),
]
# Metrics without suffix are those of the averaged weights, which checkpoints hold as `state_dict`;
# those with the suffix `_origin` belong to the weights that are being trained.
custom_hooks = [
    dict(
        type='EMAHook',
        momentum=1e-4,
        evaluate_on_ema=True,
        evaluate_on_origin=True,
        priority='ABOVE_NORMAL',
    )
]

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(enable=False, base_batch_size=1024)
