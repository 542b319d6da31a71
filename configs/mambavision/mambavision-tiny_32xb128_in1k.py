_base_ = [
    '../_base_/models/mambavision_classifier.py',
    '../_base_/datasets/imagenet_mambavision_224.py',
    '../_base_/schedules/imagenet_bs4096_lamb_320e.py',
    '../_base_/default_runtime_mmpretrain.py',
]

model = dict(type='mmvim.MesaClassifier', mesa_weight=0.5 * 50)
