_base_ = './vmamba-tiny_8xb128_in1k.py'

model = dict(backbone=dict(arch='vanilla-base'), head=dict(in_channels=1024))
