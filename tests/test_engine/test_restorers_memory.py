"""Super-resolution networks on micro-batches, and what their bank holds."""

import pytest
import torch
from conftest import RESTORERS, build_restorer, build_wrapper, train_restorer
from restorers import in_float64, same, weights

from man_mm.core.micro_batches import MicroBatches

torch.set_num_threads(1)


@pytest.fixture(params=RESTORERS)
def name(request):
    return request.param


class TestMicroBatches:
    """One image at a time gives the weights of the whole batch."""

    @staticmethod
    def train(name, size):
        model, wrapper, data = in_float64(name, micro_batch_size=size)
        for _ in range(2):
            with wrapper.optim_context(model):
                losses = model(**data, mode='loss')
            wrapper.update_params(model.parse_losses(losses)[0])
        return weights(model, wrapper), wrapper.learner

    @staticmethod
    def check(one, other):
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize('name', [name for name in RESTORERS if name != 'swinir'])
    def test_slices_equal_the_whole_batch(self, name):
        (whole, learner), (sliced, other) = (self.train(name, s) for s in (None, 1))
        self.check(whole, sliced)
        assert learner.losses.keys() == other.losses.keys()
        self.check(learner.losses, other.losses)
        start = in_float64(name)[0].state_dict()
        with pytest.raises(AssertionError):  # control
            self.check(start, whole)

    def test_control_an_activation_that_does_not_run_again(self, monkeypatch):
        def call(self, name, x):
            if name == self.parts[0]:
                self._outputs = self._run(self.chain, x)
            return self._outputs.pop(name, x)

        monkeypatch.setattr(MicroBatches, '_call', call)
        whole, sliced = (self.train('srresnet', s)[0] for s in (None, 1))
        with pytest.raises(AssertionError):
            self.check(whole, sliced)

    def test_swinir_is_refused(self):
        message = 'micro_batch_size .*layers.0.* takes more: remove micro_batch_size'
        with pytest.raises(ValueError, match=message):
            build_wrapper(build_restorer('swinir'), micro_batch_size=1)


class TestBank:
    """It holds the shallow features while a head reads them, and nothing else."""

    @staticmethod
    def watch(model, wrapper, touch=None):
        """The bank's contents as each later module starts, before and after a step."""
        learner, held = wrapper.learner, []
        handles = []
        for module in learner.modules[1:]:

            def note(_module, _args):
                maps = dict(learner.bank)
                held.append((maps, {k: v.clone() for k, v in maps.items()}))
                if touch is not None:
                    touch(maps)

            first = model.get_submodule(module.parts[0])
            handles.append(first.register_forward_pre_hook(note))
        train_restorer(model, wrapper, steps=1)
        for handle in handles:
            handle.remove()
        return held

    def test_it_holds_what_enters_only(self, name):
        model = build_restorer(name)
        wrapper = build_wrapper(model)
        held = self.watch(model, wrapper)
        assert [list(maps) for maps, _ in held] == [['entry'], ['entry'], []]
        for maps, copies in held:
            assert all(torch.equal(map_, copies[key]) for key, map_ in maps.items())
        assert not wrapper.learner.bank
        shape = held[0][0]['entry'].shape
        # Beside the map, two moments of every channel.
        assert wrapper.learner.bank_bytes <= 4 * (shape.numel() + 2 * 2 * shape[1])
        assert wrapper.learner.bank_bytes >= 4 * shape.numel()
        wrapper.initialize_count_status(model, 0, 1)
        wrapper.learner.bank = None
        with pytest.raises(ValueError, match='read a memory bank, but no MemoryBank'):
            wrapper.initialize_count_status(model, 0, 1)

    def test_without_it(self, name):
        model = build_restorer(name)
        wrapper = build_wrapper(model, aux_head=dict(use_bank=False))
        held = self.watch(model, wrapper)
        assert [list(maps) for maps, _ in held] == [[]] * 3
        other = build_restorer(name)
        without = build_wrapper(other, bank=False, aux_head=dict(use_bank=False))
        without.initialize_count_status(other, 0, 1)  # needs none
        train_restorer(other, without, steps=1)
        assert without.learner.bank_bytes == 0
        assert same(weights(model, wrapper), weights(other, without))

    def test_a_map_that_is_changed_is_noticed(self):
        def touch(maps):
            for map_ in maps.values():
                map_.mul_(2)

        model = build_restorer('edsr')
        with pytest.raises(RuntimeError, match="'entry' .* was changed in place"):
            self.watch(model, build_wrapper(model), touch)
