"""Which card a config trains on: plain, recomputed, exact, joint and local."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mmengine.config import Config
from rich.console import Console

from man_mm.engine.config_files import load_config
from man_mm.measure.planner import parse_bytes

from .card_needs import OBJECTS, STEPS, Counter, Need
from .card_search import search
from .partition_plan import build_uncomputed, images_shape
from .schemes import END_TO_END, JOINT


class CardPlan(NamedTuple):
    """Needs of a config.

    Attributes:
        config: Its path or name.
        options: Overridden settings.
        cfg: The config.
        shape: Shape ``(N, C, H, W)`` of the images.
        needs: What each way to train needs.
        budget: Bytes of the card that was asked about, or None.
        objects: Objects in an image of a detector.
    """

    config: str
    options: list[str]
    cfg: Config
    shape: tuple[int, int, int, int]
    needs: list[Need]
    budget: int | None
    objects: int = OBJECTS

    @property
    def recommended(self) -> Need | None:
        """The most accurate of the steps in modules that fit, of equal ones the first.

        Without a budget, exact steps. None if none fits, or plain training does.
        """
        if self.budget is None:
            fitting = self.needs
        else:
            fitting = [need for need in self.needs if need.fits(self.budget)]
            if self.needs[0] in fitting:
                return None
        return next((need for need in fitting if need.name in STEPS), None)


def plan_cards(
    config: str,
    budget: str | None = None,
    size: Sequence[int] | None = None,
    batch: int | None = None,
    options: Sequence[str] = (),
    objects: int = OBJECTS,
    console: Console | None = None,
) -> CardPlan:
    """Counts what each way to train needs, without training.

    Args:
        config: Path of a config with or without local learning, or its name in a
            package.
        budget: Memory of a card, such as ``'24GiB'``: where the config's partition
            needs more, others are tried. Defaults to None.
        size: Height and width of the images in pixels. Defaults to 800 and 1333, for
            classifiers 224 and 224.
        batch: Images in a step. Defaults to the train_dataloader's.
        options: Settings that override the config, each ``KEY=VALUE``.
        objects: Objects in an image of a detector. Defaults to 100.
        console: Where progress is shown.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If the config cannot be trained so.
    """
    console = console or Console(quiet=True)
    cfg = load_config(config, options)
    shape = images_shape(cfg, build_uncomputed(cfg), size, batch)
    counter = Counter(cfg, shape, objects)
    limit = None if budget is None else parse_bytes(budget, '--budget')
    with console.status('counting ...') as status:
        needs = list(_needs(counter, limit, status.update))
    return CardPlan(config, list(options), cfg, shape, needs, limit, objects)


def _needs(
    counter: Counter, limit: int | None, tell: Callable[[str], None]
) -> Iterator[Need]:
    tell('counting end-to-end training ...')
    yield counter.count(END_TO_END, END_TO_END)
    found = []
    for base in STEPS:
        tell(f'counting {base} steps ...')
        start = ()
        if base == JOINT:  # as accurate steps are cut
            start = found[0].cuts, found[0].recompute
        need = counter.count(base, base, *start)
        if limit is not None and not need.fits(limit):
            need = search(counter, base, need, limit)
        found.append(need)
    tell('counting end-to-end training, recomputed ...')
    yield counter.count_strongest(found[0].cuts, found[0].recompute)
    yield from found


def count_on_cpu(plan: CardPlan) -> tuple[list[Need], list[Need]]:
    """What the same steps need by the operators of the CPU.

    Returns:
        Without computing them, and computed.
    """
    counters = (
        Counter(plan.cfg, plan.shape, plan.objects, 'cpu', computed)
        for computed in (False, True)
    )
    without, computed = (
        [counter.count(need.name, need.scheme) for need in plan.needs]
        for counter in counters
    )
    return without, computed
