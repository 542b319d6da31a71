_base_ = './vim-tiny_8xb128_in1k.py'

# The authors published no script for this size: batch, learning rate and decay are the paper's, the
# drop path rate is the default of their code.
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.1),
    head=dict(in_channels=768),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
