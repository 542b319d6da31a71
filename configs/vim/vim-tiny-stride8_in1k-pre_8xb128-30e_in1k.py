_base_ = './vim-tiny_8xb128_in1k.py'

model = dict(
    backbone=dict(stride=8),
    # To start from a run of your own, give its checkpoint instead.
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/'
        'vim_t_midclstok_76p1acc.pth',
    ),
)

optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = [dict(type='ConstantLR', factor=1.0, by_epoch=True)]
train_cfg = dict(max_epochs=30)
