_base_ = './videomamba-tiny_8xb512_in1k.py'

model = dict(
    backbone=dict(img_size=448),
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/'
        'videomamba_t16_in1k_res224.pth',
    ),
)

train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
test_dataloader = _base_.test_dataloader
train_dataloader['batch_size'] = 256
train_dataloader['dataset']['pipeline'][1]['scale'] = 448
for loader in (val_dataloader, test_dataloader):
    loader['dataset']['pipeline'][1]['scale'] = 512
    loader['dataset']['pipeline'][2]['crop_size'] = 448

optim_wrapper = dict(optimizer=dict(lr=2e-05, weight_decay=1e-8), clip_grad=None)
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=0.05, end=5)
param_scheduler[1].update(eta_min=5e-6, begin=5, end=30)
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=2048)
