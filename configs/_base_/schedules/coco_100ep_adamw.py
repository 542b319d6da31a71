# ViTDet's 100 epochs on COCO as Vim uses them: 184,375 iterations of 64 images with AdamW, learning
# rates that fall towards the input, two steps down; 1e-4 is for a batch of 64 in total.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    constructor='mmvim.LayerDecayOptimizerConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=0.837,
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
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(
        type='MultiStepLR',
        by_epoch=False,
        begin=0,
        end=184375,
        milestones=[163889, 177546],
        gamma=0.1,
    ),
]

# The last interval is shorter, so that the final weights are evaluated as well.
train_cfg = dict(
    type='IterBasedTrainLoop',
    max_iters=184375,
    val_interval=5000,
    dynamic_intervals=[(180001, 184375)],
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(enable=False, base_batch_size=64)
