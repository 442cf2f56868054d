"""Every backbone of mmdet and mmpretrain: each row of docs/backbone_list.md is a test.

A small network of the class is cut at each unit, and the gradients of local losses and
of an exact step are compared with those of one graph.
``python tests/test_backbones/test_backbone_list.py`` runs all of them and writes the
table into the document; names, such as ``mmdet.ResNet``, run only those.
"""

import sys
from pathlib import Path

import mmdet.models.backbones
import mmpretrain.models.backbones
import pytest
from mmengine.registry import MODELS, init_default_scope

sys.path.insert(0, str(Path(__file__).parents[1] / 'helpers'))
from documents import read_marked, write_marked
from gradients import (
    build_backbone,
    exact_gradients,
    gradients_of_one_graph,
    images_for,
    local_gradients,
    plain_gradients,
    same,
)
from stock_backbones import BACKBONES

from man_mm.backbones import find_units, probe
from man_mm.core import StagePartition

DOCUMENT = Path(__file__).parents[2] / 'docs/backbone_list.md'
START, END = '<!-- table -->', '<!-- end of table -->'
ROUNDING = 1e-5  # of gradients that are small sums of large numbers
HEADER = '| package | backbone | | units | K |\n|---|---|---|---:|---:|'
QUICK = [
    'mmdet.HRNet',
    'mmdet.PyramidVisionTransformer',
    'mmdet.PyramidVisionTransformerV2',
    'mmpretrain.BEiTViT',
    'mmpretrain.DeiT3',
    'mmpretrain.MlpMixer',
    'mmpretrain.PCPVT',
    'mmpretrain.SVT',
    'mmpretrain.SwinTransformerV2',
    'mmpretrain.T2T_ViT',
    'mmpretrain.TIMMBackbone',
    'mmpretrain.ViTSAM',
    'mmpretrain.XCiT',
]


def row(name):
    """Checks a backbone; returns its line of the table."""
    count = k = '–'
    try:
        model = build_backbone(BACKBONES[name])
        units = find_units(model)
    except ImportError:
        result = 'not tried: needs the package timm'
    except ValueError as error:
        result = f'refused: {reason(error)}'
    else:
        result, count = 'works', len(units)
        k = len(StagePartition().cuts(units)) + 1
        probe(model, units)
        check(BACKBONES[name])
    package, _, kind = name.partition('.')
    return f'| {package} | `{kind}` | {result} | {count} | {k} |'


def reason(error):
    """Why a backbone is refused: the end of the first sentence of the message."""
    sentence = str(error).partition('. ')[0]
    assert ', which ' in sentence, error
    return sentence.partition(', which ')[2]


def check(cfg):
    """Each loss trains its own unit alone; exact steps equal back-propagation."""
    images = images_for(cfg)
    _, local = local_gradients(cfg, images)
    assert same(local, gradients_of_one_graph(cfg, images)[1])
    plain = plain_gradients(cfg, images)
    assert same(exact_gradients(cfg, images), plain, ROUNDING)
    assert not same(local, plain, ROUNDING)  # control
    assert {k for k, v in local.items() if v is None} <= {
        k for k, v in plain.items() if v is None
    }


def rows_of_document():
    """The rows of the table by name."""
    lines = read_marked(DOCUMENT, START, END).splitlines()[2:]
    cells = ([cell.strip(' `') for cell in line.split('|')] for line in lines)
    names = [f'{package}.{kind}' for _, package, kind, *_ in cells]
    return dict(zip(names, lines, strict=True))


def write(rows):
    """Writes the table, the rows in the order of the list."""
    table = '\n'.join([HEADER, *(rows[name] for name in BACKBONES if name in rows)])
    write_marked(DOCUMENT, START, END, table)


def rows():
    return [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in BACKBONES
    ]


@pytest.mark.parametrize('name', rows())
def test_row(name):
    assert row(name) == rows_of_document()[name]


def test_the_list_has_every_backbone_of_both_packages():
    assert list(rows_of_document()) == list(BACKBONES)
    for package in (mmdet, mmpretrain):
        init_default_scope(package.__name__)
        places = {f'{package.__name__}.{x}' for x in package.models.backbones.__all__}
        registered = {name for name in places if MODELS.get(name) is not None}
        assert registered == {x for x in BACKBONES if x in places}
        assert {x for x in BACKBONES if x.startswith(f'{package.__name__}.')} <= places


def test_none_is_refused_but_for_a_reason():
    refused = [line for line in rows_of_document().values() if '| refused' in line]
    for line in refused:
        assert 'several paths' in line or 'pre-training' in line
    assert len(rows_of_document()) - len(refused) > 70


if __name__ == '__main__':
    import logging

    logging.disable(logging.WARNING)
    for name in sys.argv[1:] or BACKBONES:
        line = row(name)
        write({**rows_of_document(), name: line})
        print(line, flush=True)
