# Classification of images in class folders: data/own_images/{train,val}/<class>/*.jpg
_base_ = [
    '../_base_/models/vim_classifier.py',
    '../_base_/datasets/own_images.py',
    '../_base_/schedules/own_50e.py',
    '../_base_/default_runtime_mmpretrain.py',
]
classes = ('cat', 'dog')
weights = (
    'https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth'
)

model = dict(
    data_preprocessor=dict(num_classes=len(classes)),
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=weights)),
    head=dict(num_classes=len(classes)),
    train_cfg=dict(_delete_=True),  # no Mixup and CutMix
)
data = dict(metainfo=dict(classes=classes))
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = dict(dataset=data)
