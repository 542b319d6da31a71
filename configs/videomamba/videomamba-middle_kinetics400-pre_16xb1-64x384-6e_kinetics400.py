_base_ = './videomamba-middle_in1k-pre_16xb4-64x224-50e_kinetics400.py'

model = dict(
    backbone=dict(img_size=384, init_cfg=None),
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
        'videomamba_m16_k400_f64_res224.pth',
    ),
)

train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
test_dataloader = _base_.test_dataloader
for loader in (val_dataloader, test_dataloader):
    for step in loader['dataset']['pipeline'][1:3]:
        step['size'] = 384
train_dataloader['dataset']['pipeline'][1]['transforms'][1]['size'] = 384
train_dataloader['batch_size'] = 1

optim_wrapper = dict(accumulative_counts=2, optimizer=dict(lr=1.25e-06, weight_decay=1e-8))
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=0.2, end=1)
param_scheduler[1].update(eta_min_ratio=0.2, begin=1, end=6)
train_cfg = dict(max_epochs=6)
auto_scale_lr = dict(base_batch_size=32)
