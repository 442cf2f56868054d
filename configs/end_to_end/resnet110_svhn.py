# ResNet-110 on SVHN, otherwise as ResNet-32.
_base_ = './resnet32_svhn.py'
model = dict(backbone=dict(depth=110))
