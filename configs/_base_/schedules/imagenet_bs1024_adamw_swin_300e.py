# Swin Transformer's and VMamba's ImageNet-1K schedule: DeiT's with 20 epochs of warm-up, clipping,
# half the weight decay and a shorter average.
_base_ = './imagenet_bs1024_adamw_300e.py'

optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    # No decay for one-dimensional parameters (norms, biases, D), state matrices, biases of Δ.
    paramwise_cfg=dict(
        _delete_=True,
        flat_decay_mult=0.0,
        custom_keys={
            'A_log': dict(decay_mult=0.0),
            'dt_projs_bias': dict(decay_mult=0.0),
        },
    ),
)
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(end=20)
param_scheduler[1].update(begin=20)
custom_hooks = _base_.custom_hooks
custom_hooks[0].update(momentum=1e-4)
