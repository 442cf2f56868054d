"""Whether the OpenMMLab packages that are installed go together.

Several distributions bring the same import name: ``mmcv`` and ``onedl-mmcv`` both bring
``mmcv``. So packages are looked up by what they are imported as, and man_mm requires
none of them by default: pip would install it over another.
"""

import re
import warnings
from importlib.metadata import Distribution
from importlib.util import find_spec
from pathlib import Path

__all__ = ['INSTALL', 'check_stack', 'find_distributions', 'find_problems']

INSTALL = (
    'Install the packages of one stack, as far as you use them: mmengine, mmcv, mmdet '
    'and mmpretrain (official), or onedl-mmengine, onedl-mmcv, onedl-mmdetection and '
    'onedl-mmpretrain (maintained forks).'
)
OLDEST = dict(
    mmengine='0.10.3', mmcv='2.1.0', mmdet='3.3.0', mmpretrain='1.2.0', mmagic='1.2.0'
)
# These raise an AssertionError when imported beside a later mmcv.
REFUSED_MMCV = '2.2.0'
REFUSING = dict(mmdet='3.4.0', mmagic='1.3.0')  # versions below these


def check_stack() -> None:
    """Warns, once and of everything, if installed packages do not go together."""
    found = {name: find_distributions(name) for name in OLDEST}
    if problems := find_problems(found):
        lines = [
            'The OpenMMLab packages that are installed do not go together:',
            *(f'- {problem}.' for problem in problems),
            INSTALL,
        ]
        warnings.warn('\n'.join(lines), stacklevel=2)


def find_distributions(name: str) -> dict[str, str]:
    """Finds the distributions that installed a package, without importing it.

    Args:
        name: What it is imported as.

    Returns:
        Their versions by name. Empty if the package is not there, or was not copied by
        pip to where it lies, such as a checkout on ``PYTHONPATH``.
    """
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return {}
    site = Path(spec.origin).parents[1]
    file = re.compile(rf'^{name}/__init__\.py,', re.M)
    infos = map(Distribution.at, site.glob(f'*{name}*.dist-info'))
    return {
        x.name: x.version for x in infos if file.search(x.read_text('RECORD') or '')
    }


def find_problems(found: dict[str, dict[str, str]]) -> list[str]:
    """Lists what is wrong with a set of packages.

    Args:
        found: By import name, the distributions that installed it and their versions.

    Returns:
        A sentence without its full stop for each problem.
    """
    from mmengine.utils import digit_version as parse

    problems = [
        f'{name} was installed by {" and ".join(sorted(distributions))}, one over the '
        'other: uninstall both, then install one of them again'
        for name, distributions in found.items()
        if len(distributions) > 1
    ]
    versions = {
        name: version
        for name, distributions in found.items()
        for version in distributions.values()
        if len(distributions) == 1
    }
    problems += [
        f'{name} {version} is too old: man_mm needs {OLDEST[name]} or later'
        for name, version in versions.items()
        if parse(version) < parse(OLDEST[name])
    ]
    mmcv = versions.get('mmcv', OLDEST['mmcv'])
    problems += [
        f'{name} {versions[name]} needs mmcv below {REFUSED_MMCV}, and refuses {mmcv}'
        for name, until in REFUSING.items()
        if name in versions
        and parse(versions[name]) < parse(until)
        and parse(mmcv) >= parse(REFUSED_MMCV)
    ]
    return problems
