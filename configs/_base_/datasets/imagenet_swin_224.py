# ImageNet-1K as Swin Transformer and VMamba see it: as in imagenet_deit_224.py, without repeated
# augmentation.
_base_ = ['./imagenet_deit_224.py']

train_dataloader = dict(sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True))
