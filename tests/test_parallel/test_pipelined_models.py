"""Real models in two processes, a module or two each, equal one process bit by bit."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import (
    batch_of,
    build_classifier,
    build_detector,
    detector_config,
    labelled_images,
)

from man_mm.core import MemoryBank
from man_mm.engine.constructor import build_learner
from man_mm.parallel import ModulePipeline

STEPS = 3


def build_retinanet():
    return build_detector(detector_config('retinanet', 18, frozen=1))


def detection_batch(step):
    torch.manual_seed(step)
    return batch_of(2, 64 + 32 * step, 96)


def classification_batch(step):
    torch.manual_seed(step)
    return labelled_images(4 - step, 64)


MODELS = {
    'detector': (build_retinanet, detection_batch),
    'classifier': (lambda: build_classifier(18), classification_batch),
}


def build_one(name, **options):
    build, _ = MODELS[name]
    options = dict(
        partition=dict(type='StagePartition'), aux_head=dict(type='MANHead'), **options
    )
    model = build()
    torch.manual_seed(1)
    learner = build_learner(model, **options)
    learner.bank = MemoryBank()
    return learner


def parts_of_step(name, step, learner):
    """The forward function of a batch, and what the heads read of the batch."""
    data = learner.model.data_preprocessor(MODELS[name][1](step), True)

    def run():
        losses = learner.model(**data, mode='loss')
        return learner.model.parse_losses(losses)[0]

    return run, data['data_samples']


def sgd(params):
    return torch.optim.SGD(params, 0.01, momentum=0.9)


def train_pipeline(name, reads=None, **options):
    pipeline = ModulePipeline(build_one(name, **options), reads=reads)
    optimizer = sgd(pipeline.params())

    def backward(loss, module, complete):
        loss.backward()
        if complete:
            optimizer.step()
            optimizer.zero_grad()

    for step in range(STEPS):
        pipeline.step(*parts_of_step(name, step, pipeline.learner), backward)
    return pipeline.gather()


def train_alone(name, **options):
    learner = build_one(name, **options)
    optimizer = sgd([*learner.model.parameters(), *learner.heads.parameters()])
    for step in range(STEPS):
        run, targets = parts_of_step(name, step, learner)
        with learner.step(targets):
            loss = run()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(
        model=learner.model.state_dict(),
        heads=learner.heads.state_dict(),
        bank=learner.bank.state_dict(),
    )


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    results = dict(
        detector=train_pipeline('detector'),
        classifier=train_pipeline('classifier', reads=[]),
        micro=train_pipeline('classifier', micro_batch_size=2),
    )
    torch.save(results, f'{folder}/{rank}.pth')


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pipeline')
    mp.start_processes(worker, (str(folder),), nprocs=2, start_method='fork')
    return torch.load(folder / '0.pth')


def check_equal(whole, other):
    assert whole.keys() == other.keys()
    for key, value in whole.items():
        if isinstance(value, dict):
            check_equal(value, other[key])
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


@pytest.mark.parametrize('name', MODELS)
def test_two_processes_equal_one(results, name):
    check_equal(results[name], train_alone(name))


def test_with_micro_batches_two(results):
    check_equal(results['micro'], train_alone('classifier', micro_batch_size=2))
    with pytest.raises(AssertionError):
        check_equal(results['micro'], results['classifier'])


def test_a_checkpoint_loads_strictly_in_the_plain_model(results):
    model = build_retinanet()
    before = model.backbone.layer2[0].conv1.weight.clone()
    model.load_state_dict(results['detector']['model'], strict=True)
    assert not torch.equal(model.backbone.layer2[0].conv1.weight, before)
