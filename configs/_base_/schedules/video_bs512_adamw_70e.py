# VideoMamba's schedule for videos: AdamW, 5 epochs of warm-up, cosine, 70 epochs, bfloat16 with
# --amp-dtype bfloat16. 8e-4 is for a batch of 512 videos in total, each seen twice.
#
# The patch embedding, the class token and the spatial positions hardly learn: the official layer
# decay of 0.75 reaches only these, with the exponent of the first of 24 layers.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=8e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={
            'A_log': dict(decay_mult=0.0),
            'A_b_log': dict(decay_mult=0.0),
            'temporal_pos_embedding': dict(decay_mult=0.0),
            'backbone.cls_token': dict(lr_mult=0.75**25, decay_mult=0.0),
            'backbone.pos_embed': dict(lr_mult=0.75**25, decay_mult=0.0),
            'backbone.patch_embed': dict(lr_mult=0.75**25),
            'backbone.patch_embed.proj.bias': dict(lr_mult=0.75**25, decay_mult=0.0),
        },
    ),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=5e-3,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=5e-3,
        by_epoch=True,
        begin=5,
        end=70,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=70, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

auto_scale_lr = dict(enable=False, base_batch_size=512)
