# ResNet-110 on STL-10, otherwise as ResNet-32.
_base_ = './resnet32_stl10.py'
model = dict(backbone=dict(depth=110))
