_base_ = './videomamba-tiny_in1k-pre_8xb64-16x224-35e_sthv2.py'

model = dict(
    backbone=dict(img_size=288, init_cfg=None),
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
        'videomamba_t16_ssv2_f16_res224.pth',
    ),
)

train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
test_dataloader = _base_.test_dataloader
for loader in (val_dataloader, test_dataloader):
    for step in loader['dataset']['pipeline'][1:3]:
        step['size'] = 288
train_dataloader['dataset']['pipeline'][1]['transforms'][1]['size'] = 288
train_dataloader['batch_size'] = 32

optim_wrapper = dict(optimizer=dict(lr=2e-05, weight_decay=1e-8))
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=0.2, end=2)
param_scheduler[1].update(eta_min_ratio=0.2, begin=2, end=10)
train_cfg = dict(max_epochs=10)
auto_scale_lr = dict(base_batch_size=512)
