# MambaVision's ImageNet-1K schedule: LAMB, a cosine from epoch 0 to 5e-6 at epoch 310, over which
# lie 20 epochs of warm-up from 1e-6, 10 epochs of cooldown at 5e-6, exponential moving average,
# distillation from it (MESA). 5e-3 is for a batch of 4096 in total.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='Lamb', lr=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    # No decay for one-dimensional parameters (norms, biases, D, layer scales) and state matrices.
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={'A_log': dict(decay_mult=0.0)},
    ),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=2e-4,
        by_epoch=True,
        begin=0,
        end=20,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=5e-6,
        by_epoch=True,
        begin=0,
        end=310,
        convert_to_iter_based=True,
    ),
    dict(type='ConstantLR', factor=1.0, by_epoch=True, begin=310, end=320),
]
# Metrics without suffix are those of the averaged weights, which checkpoints hold as `state_dict`;
# those with the suffix `_origin` belong to the weights that are being trained. Statistics of batch
# norms are averaged too, and over all processes after each epoch.
custom_hooks = [
    dict(
        type='EMAHook',
        momentum=2e-4,
        update_buffers=True,
        evaluate_on_ema=True,
        evaluate_on_origin=True,
        priority='ABOVE_NORMAL',
    ),
    dict(type='SyncBuffersHook'),
    # After a quarter of the 310 epochs before the cooldown.
    dict(type='mmvim.MesaHook', start=0.25 * 310 / 320),
]

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=320, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(enable=False, base_batch_size=4096)
