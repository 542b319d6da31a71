_base_ = './videomamba-middle_in1k-pre_16xb4-64x224-50e_kinetics400.py'

model = dict(
    data_preprocessor=dict(num_classes=180),
    backbone=dict(
        init_cfg=dict(
            checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
            'videomamba_m16_k400_f64_res224.pth'
        )
    ),
    head=dict(num_classes=180),
)

train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
test_dataloader = _base_.test_dataloader
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader['dataset'].update(
        data_root='data/coin', ann_file='annotations/val.csv', data_prefix='videos', num_classes=180
    )
train_dataloader['dataset']['ann_file'] = 'annotations/train.csv'
test_dataloader['dataset']['pipeline'][0]['num_clips'] = 10
train_dataloader['batch_size'] = 4

optim_wrapper = dict(
    optimizer=dict(lr=5e-05),
    paramwise_cfg=dict(
        custom_keys={
            'backbone.cls_token': dict(lr_mult=0.8**33),
            'backbone.pos_embed': dict(lr_mult=0.8**33),
            'backbone.patch_embed': dict(lr_mult=0.8**33),
            'backbone.patch_embed.proj.bias': dict(lr_mult=0.8**33),
        }
    ),
)
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=0.005, end=5)
param_scheduler[1].update(eta_min_ratio=0.005, begin=5, end=30)
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=32)
