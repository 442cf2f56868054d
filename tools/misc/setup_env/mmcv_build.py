"""mmcv with its compiled ops: built once, then taken from a cache of this user."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from places import CONSTRAINTS, PYTHON, STACK, VENV
from shell import SetupError, Shell

# Without the debugging symbols that Python's own flags ask for.
BUILD_FLAGS = '-g0 -O2 -DNDEBUG -fwrapv'
GIB = 2**30


def constrained_version(name: str) -> str:
    """Return the version of a package in the constraints."""
    return re.search(rf'^{name}==(\S+)$', CONSTRAINTS.read_text('utf-8'), re.M)[1]


def file_name() -> str:
    """Return how mmcv's distribution is spelt in the names of files."""
    return STACK.mmcv.replace('-', '_')


def mmcv_variant(shell: Shell) -> str:
    """Name what a built mmcv depends on: versions, platform and kind of ops."""
    code = (
        'import json, sys, sysconfig, torch;'
        'from torch.utils.cpp_extension import CUDA_HOME;'
        'cuda = torch.cuda.is_available() and CUDA_HOME is not None;'
        'print(json.dumps([torch.__version__, sys.version_info[:2],'
        ' sysconfig.get_platform(), "cuda" if cuda else "cpu"]))'
    )
    output = subprocess.check_output(
        [str(PYTHON), '-c', code], text=True, stderr=shell.log
    )
    torch, (major, minor), platform, ops = json.loads(output)
    version = constrained_version(STACK.mmcv)
    return f'{STACK.mmcv}-{version}-torch-{torch}-cp{major}{minor}-{platform}-{ops}'


def check_compiler() -> None:
    """Fail early where mmcv cannot be compiled."""
    compiler = os.environ.get('CXX', 'c++')
    if shutil.which(compiler) is None:
        raise SetupError(
            f'mmcv is compiled here, but the C++ compiler `{compiler}` was not found. '
            'Install one that knows C++20, such as g++ 11.'
        )
    code = 'import sysconfig; print(sysconfig.get_path("include"))'
    include = subprocess.check_output([str(PYTHON), '-c', code], text=True).strip()
    if not (Path(include) / 'Python.h').exists():
        raise SetupError(
            "mmcv is compiled here, but Python's headers were not found. "
            "Install them (Debian's package python3-dev, for example)."
        )


def unpack_mmcv(shell: Shell, folder: Path) -> Path:
    """Download and unpack mmcv's source, unless an interrupted build has it."""
    version = constrained_version(STACK.mmcv)
    source = folder / 'source'
    if source.exists():
        return source
    shutil.rmtree(folder, ignore_errors=True)
    shell.pip(
        'download', '--no-deps', '--no-build-isolation', '--no-binary', STACK.mmcv,
        '--dest', folder, f'{STACK.mmcv}=={version}',
    )  # fmt: skip
    unpacked = folder / f'{file_name()}-{version}'
    shutil.unpack_archive(f'{unpacked}.tar.gz', folder)
    setup = unpacked / 'setup.py'
    # The headers of torch 2.14 need C++20; mmcv's choice comes last on the command
    # line, where no CXXFLAGS can override it.
    text = setup.read_text('utf-8').replace('-std=c++17', '-std=c++20')
    setup.write_text(text, 'utf-8')
    return unpacked.rename(source)


def build_jobs() -> int:
    """Return how many compilers fit: one a core, 2 GiB of memory for each."""
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return max(1, min(os.cpu_count() or 1, memory // (2 * GIB)))


def precompile_headers(shell: Shell, source: Path) -> str:
    """Compile torch's headers once instead of once for each of mmcv's files.

    They take nine tenths of the build. GCC takes a precompiled header that lies
    beside the header itself, if both were compiled with the same options; other
    compilers, and GCC with other options, ignore it.

    Returns:
        The options for mmcv's files. They include the header in front of each: GCC
        takes a precompiled one only where nothing stands before it.
    """
    header = source / 'mmcv/ops/csrc/common/pytorch_cpp_helper.hpp'
    code = (
        'import sysconfig; from torch.utils.cpp_extension import include_paths;'
        'print(*include_paths(), sysconfig.get_path("include"), sep="\\n")'
    )
    paths = subprocess.check_output(
        [str(PYTHON), '-c', code], text=True, stderr=shell.log
    ).splitlines()
    shell.run(
        os.environ.get('CXX', 'c++'), *BUILD_FLAGS.split(), '-fPIC', '-std=c++20',
        '-DTORCH_API_INCLUDE_EXTENSION_H', '-DTORCH_EXTENSION_NAME=_ext',
        *[f'-I{path}' for path in paths],
        '-x', 'c++-header', header, '-o', f'{header}.gch',
    )  # fmt: skip
    return f'{BUILD_FLAGS} -include {shlex.quote(str(header))}'


def build_mmcv(shell: Shell, variant: str, target: Path) -> None:
    """Build mmcv's wheel with its ops into ``target``."""
    check_compiler()
    folder = VENV / 'build' / variant
    source = unpack_mmcv(shell, folder)
    env = {
        'CFLAGS': precompile_headers(shell, source),
        'MMCV_WITH_OPS': '1',
        'MAX_JOBS': os.environ.get('MAX_JOBS', str(build_jobs())),
    }
    if variant.endswith('cpu'):
        # mmcv asks for nvcc wherever torch sees a GPU.
        env['CUDA_VISIBLE_DEVICES'] = ''
    shell.pip(
        'wheel', '-v', '--no-build-isolation', '--no-deps', '--wheel-dir',
        folder / 'wheel', source, **env,
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f'{target.name}.{os.getpid()}')
    shutil.copytree(folder / 'wheel', staging)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    shutil.rmtree(VENV / 'build')


def install_mmcv(shell: Shell) -> None:
    """Install mmcv from the cache of this user, after building it if need be."""
    variant = mmcv_variant(shell)
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    folder = cache / 'man_mm' / variant
    was_cached = folder.exists()
    if not was_cached:
        build_mmcv(shell, variant, folder)
    try:
        # pip would keep an mmcv of this version, even one without ops.
        shell.run(PYTHON, '-m', 'pip', 'uninstall', '--yes', STACK.mmcv)
        shell.pip('install', *folder.glob(f'{file_name()}-*.whl'))
        shell.run(PYTHON, '-c', 'import mmcv.ops')
    except SetupError:
        shutil.rmtree(folder)
        if not was_cached:
            raise
        shell.log.write('\nThe cached wheel does not work: building a new one.\n')
        install_mmcv(shell)
