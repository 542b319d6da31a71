_base_ = './vmamba-tiny_8xb128_in1k.py'

model = dict(backbone=dict(arch='base-s2l15'), head=dict(in_channels=1024))
