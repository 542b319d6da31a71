# The same images as 256 tokens: does the method matter more on longer sequences?
_base_ = ['./vim_cifar10.py']

model = dict(backbone=dict(patch_size=2))
