_base_ = './videomamba-tiny_8xb512_in1k.py'

model = dict(
    backbone=dict(img_size=576),
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://pjlab-gvm-data.oss-cn-shanghai.aliyuncs.com/videomamba/'
        'videomamba_t16_in1k_res224to448.pth',
    ),
)

train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
test_dataloader = _base_.test_dataloader
train_dataloader['batch_size'] = 128
train_dataloader['dataset']['pipeline'][1]['scale'] = 576
for loader in (val_dataloader, test_dataloader):
    loader['dataset']['pipeline'][1]['scale'] = 658
    loader['dataset']['pipeline'][2]['crop_size'] = 576

optim_wrapper = dict(optimizer=dict(lr=1e-05, weight_decay=1e-8), clip_grad=None)
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=0.1, end=2)
param_scheduler[1].update(eta_min=5e-6, begin=2, end=10)
train_cfg = dict(max_epochs=10)
auto_scale_lr = dict(base_batch_size=1024)
