"""When auxiliary heads run in joint steps, which their memory shows."""

import pytest
import torch
from torch import nn

from man_mm.core import ExactSteps, LocalLearner, Unit, split
from man_mm.measure.memory import measure_memory

torch.set_num_threads(1)


class LargeHead(nn.Module):
    """Saves six maps as large as the module's output for its backward pass."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(6)))

    def forward(self, maps, targets, bank):
        return self.convs(maps[list(maps)[-1]]).square().mean()


@pytest.mark.parametrize('recompute_last', [True, False], ids=['twice', 'once'])
@pytest.mark.parametrize('inner', [False, True])
def test_heads_that_read_a_boundary_run_before_their_module_does(inner, recompute_last):
    x = torch.rand(1, 4, 64, 64)
    map_bytes = x.nbytes

    def peak(weight):
        model = nn.Sequential()
        for index in range(4):
            block = [
                f() for _ in range(6) for f in (lambda: nn.Conv2d(4, 4, 1), nn.Tanh)
            ]
            model.add_module(f'stage{index + 1}', nn.Sequential(*block))
        # Where its units are stages, the head of the first module reads both.
        units = [Unit(f'stage{i + 1}', i if inner else i // 2) for i in range(4)]
        modules = split(model, units, ['stage2'])
        learner = LocalLearner(model, modules, [LargeHead()])
        steps = ExactSteps(learner, weight, recompute_last)

        def run():
            with steps.step():
                loss = model(x).sum()
            loss.backward()
            steps.replay()

        return measure_memory(run).peak

    more = peak(0.1) - peak(0)
    if inner:  # it has to wait for the map, and saves beside the module
        assert more > 5 * map_bytes
    else:
        assert more < 0.1 * map_bytes
