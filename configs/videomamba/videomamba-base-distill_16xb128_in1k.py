_base_ = './videomamba-middle-distill_16xb128_in1k.py'

model = dict(backbone=dict(arch='base'), head=dict(in_channels=768))
