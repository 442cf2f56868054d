"""Build script of man_mm; the requirement lists live in ``requirements/``."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_ASSETS = ('configs', 'tools', 'model-index.yml')
# setup_env prepares a checkout, so it has no use once installed.
NOT_INSTALLED = ('__pycache__', '*.pyc', 'setup_env')


def read_version() -> str:
    """Read ``__version__`` without importing the package."""
    source = (ROOT / 'man_mm/version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'", source, re.M)[1]


def read_requirements(*names: str) -> list[str]:
    """Collect the requirements of the named lists, each one once."""
    lines = []
    for name in names:
        text = (ROOT / f'requirements/{name}.txt').read_text(encoding='utf-8')
        lines += [line.strip() for line in text.splitlines()]
    return sorted({line for line in lines if line and not line.startswith('#')})


class BuildWithMim(build_py):
    """Build the package with the ``.mim`` folder in which ``mim`` looks.

    ``mim`` reads ``configs``, ``tools`` and ``model-index.yml`` from there. They
    are copied into the build folder only, so the source tree stays clean.
    """

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib) / 'man_mm'
        # A module or config deleted since the last build must not be shipped.
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        for name in MIM_ASSETS:
            self._copy_asset(ROOT / name, package / '.mim' / name)

    def _copy_asset(self, source: Path, target: Path) -> None:
        if source.is_dir():
            ignore = shutil.ignore_patterns(*NOT_INSTALLED)
            shutil.copytree(source, target, ignore=ignore)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


# Of each stack of OpenMMLab packages its own: no extra installs one over another.
STACKS = ('det', 'cls', 'sr', 'onedl-det', 'onedl-cls')
EXTRAS = {name: read_requirements(name) for name in (*STACKS, 'dev', 'docs')}
EXTRAS['all'] = read_requirements('det', 'cls', 'sr')

setup(
    name='man-mm',
    version=read_version(),
    description='Local-learning training for OpenMMLab models',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires='>=3.10,<3.13',
    packages=find_packages(include=['man_mm', 'man_mm.*']),
    package_data={'man_mm.leaderboard': ['templates/*']},
    install_requires=read_requirements('runtime'),
    extras_require=EXTRAS,
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
)
