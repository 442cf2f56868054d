# ResNet-110 on CIFAR-10, otherwise as ResNet-32.
_base_ = './resnet32_cifar10.py'
model = dict(backbone=dict(depth=110))
