# Vim's and DeiT's ImageNet-1K schedule: AdamW, 5 epochs of warm-up from 1e-6, cosine to 1e-5, 300
# epochs, exponential moving average, no gradient clipping. 1e-3 is for a batch of 1024 in total.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
    # No decay for one-dimensional parameters (norms, biases, D), state matrices, tokens, positions.
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={
            'A_log': dict(decay_mult=0.0),
            'A_b_log': dict(decay_mult=0.0),
            'cls_token': dict(decay_mult=0.0),
            'pos_embed': dict(decay_mult=0.0),
        },
    ),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5, end=300),
]
# Metrics without suffix are those of the averaged weights, which checkpoints hold as `state_dict`;
# those with the suffix `_origin` belong to the weights that are being trained.
custom_hooks = [
    dict(
        type='EMAHook',
        momentum=4e-5,
        evaluate_on_ema=True,
        evaluate_on_origin=True,
        priority='ABOVE_NORMAL',
    )
]

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(enable=False, base_batch_size=1024)
