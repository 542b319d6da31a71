_base_ = './videomamba-tiny_in1k-pre_16xb16-64x224-70e_kinetics400.py'

model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(
        init_cfg=dict(
            checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
            'videomamba_t16_k400_f64_res224.pth'
        )
    ),
    head=dict(num_classes=10),
)

train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
test_dataloader = _base_.test_dataloader
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader['dataset'].update(
        data_root='data/breakfast',
        ann_file='annotations/val.csv',
        data_prefix='videos',
        num_classes=10,
    )
train_dataloader['dataset']['ann_file'] = 'annotations/train.csv'
train_dataloader['batch_size'] = 16

optim_wrapper = dict(optimizer=dict(lr=0.0004))
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=0.005, end=5)
param_scheduler[1].update(eta_min_ratio=0.005, begin=5, end=70)
train_cfg = dict(max_epochs=70)
auto_scale_lr = dict(base_batch_size=256)
