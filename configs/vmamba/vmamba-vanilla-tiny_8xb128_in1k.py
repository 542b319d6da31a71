_base_ = './vmamba-tiny_8xb128_in1k.py'

model = dict(backbone=dict(arch='vanilla-tiny'))

# The only model that was trained without an average.
custom_hooks = []
