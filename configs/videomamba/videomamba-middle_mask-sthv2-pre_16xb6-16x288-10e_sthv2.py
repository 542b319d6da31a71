_base_ = './videomamba-middle_mask-pre_16xb32-8x224-30e_sthv2.py'

model = dict(
    backbone=dict(num_frames=16, img_size=288, init_cfg=None),
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
        'videomamba_m16_ssv2_mask_ft_f8_res224.pth',
    ),
)

train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
test_dataloader = _base_.test_dataloader
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader['dataset']['pipeline'][0]['num_frames'] = 16
for loader in (val_dataloader, test_dataloader):
    for step in loader['dataset']['pipeline'][1:3]:
        step['size'] = 288
train_dataloader['dataset']['pipeline'][1]['transforms'][1]['size'] = 288
train_dataloader['batch_size'] = 6

optim_wrapper = dict(optimizer=dict(lr=3.75e-06, weight_decay=1e-8))
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=0.2, end=2)
param_scheduler[1].update(eta_min_ratio=0.2, begin=2, end=10)
train_cfg = dict(max_epochs=10)
auto_scale_lr = dict(base_batch_size=96)
