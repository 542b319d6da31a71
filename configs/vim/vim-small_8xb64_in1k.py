_base_ = './vim-tiny_8xb128_in1k.py'

model = dict(
    backbone=dict(arch='small', drop_path_rate=0.05),
    head=dict(in_channels=384),
)
train_dataloader = dict(batch_size=64)

# The learning rate stays at 1e-3, now for a batch of 512.
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
auto_scale_lr = dict(base_batch_size=512)
