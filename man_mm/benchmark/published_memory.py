"""What a package says that the training of its config took on GPUs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import yaml

_KEY = 'Training Memory (GB)'


def published_memory(config: str) -> float | None:
    """Peak memory on a GPU, as the metafile beside a stock config has it.

    Args:
        config: Name of the config in a package (``'mmdet::...'``).

    Returns:
        Gigabytes; None if none are known, or ``config`` is a path.

    Examples:
        >>> from man_mm.benchmark.published_memory import published_memory
        >>> published_memory('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
        3.8
    """
    package, _, name = config.partition('::')
    spec = find_spec(package) if name else None
    if spec is None:
        return None
    path = Path(spec.origin).parent / '.mim/configs' / name
    metafile = path.with_name('metafile.yml')
    if not metafile.is_file():
        return None
    for model in yaml.safe_load(metafile.read_text('utf-8')).get('Models', ()):
        if Path(model.get('Config', '')).name == path.name:
            return model.get('Metadata', {}).get(_KEY)
    return None
