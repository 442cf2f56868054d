"""Set up ``.venv`` with everything that man_mm, its tests and its demo need.

Run by ``make setup``; needs nothing but Python's standard library. Each step
leaves a stamp when it is finished, so a second call does nothing, and a call after
an interruption goes on where the last one stopped. Starts under Python 3.7 or later,
to say what is missing, and finds a supported one for ``.venv`` by itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

from ticker import Ticker, duration

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / '.venv'
STAMPS = VENV / 'stamps'
LOG = VENV / 'setup.log'
LOCK = VENV / 'setup.lock'
PYTHON = VENV / 'bin' / 'python'
REQUIREMENTS = ROOT / 'requirements'
CONSTRAINTS = REQUIREMENTS / 'constraints.txt'
# What an installation of man_mm is made from.
SOURCES = ('man_mm', 'configs', 'tools', 'requirements', 'setup.py', 'pyproject.toml')
SOURCES += ('MANIFEST.in', 'model-index.yml', 'README.md', 'LICENSE')
SUPPORTED_MINORS = (11, 12, 10)  # of Python 3, the best tested first
LOG_TAIL = 25
# Of mmcv: without the debugging symbols that Python's own flags ask for.
BUILD_FLAGS = '-g0 -O2 -DNDEBUG -fwrapv'
GIB = 2**30


class SetupError(Exception):
    """A failure that is explained to the user in one sentence."""


class Shell:
    """Runs commands with their output in the log and the ticker's line."""

    def __init__(self, log: TextIO, lock: TextIO) -> None:
        self.log = log
        self.lock = lock

    def run(self, *command: str | Path, **env: str) -> None:
        """Run a command.

        Raises:
            SetupError: If the command exits with an error.
        """
        command = tuple(map(str, command))
        self.log.write(f'\n$ {" ".join(command)}\n')
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, 'PYTHONUNBUFFERED': '1', **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            # If this script is killed, its child still holds the lock.
            pass_fds=(self.lock.fileno(),),
        )
        with process, Ticker() as ticker:
            for line in process.stdout:
                self.log.write(line)
                self.log.flush()
                ticker.last_line = line
        if process.returncode:
            shown = ' '.join([Path(command[0]).name, *command[1:4]])
            raise SetupError(f'`{shown} ...` exited with {process.returncode}.')

    def pip(self, subcommand: str, *args: str | Path, **env: str) -> None:
        """Run pip of the environment under the constraints."""
        self.run(PYTHON, '-m', 'pip', subcommand, '-c', CONSTRAINTS, *args, **env)


# --------------------------------------------------------------------- python


def probe(python: str | Path) -> tuple[int, bool] | None:
    """Ask an interpreter for its minor version and whether it can make a venv.

    Returns:
        ``(minor, has_venv)``, or None if it is not a Python 3 that runs.
    """
    code = (
        'import sys, importlib.util as u; assert sys.version_info[0] == 3;'
        'print(sys.version_info[1], int(u.find_spec("ensurepip") is not None))'
    )
    try:
        output = subprocess.check_output(
            [str(python), '-c', code], text=True, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    minor, has_venv = map(int, output.split())
    return minor, bool(has_venv)


def choose_python(candidates: Iterable[str]) -> str:
    """Return the first candidate that is supported.

    Raises:
        SetupError: If none is; the message names what was found.
    """
    rejected = []
    for python in candidates:
        found = probe(python)
        if found is None:
            continue
        minor, has_venv = found
        if minor in SUPPORTED_MINORS and has_venv:
            return python
        why = '' if has_venv else f' without venv (install python3.{minor}-venv)'
        rejected.append(f'Python 3.{minor}{why}')
    raise SetupError(
        'man_mm needs Python 3.10, 3.11 or 3.12, but found only '
        f'{", ".join(dict.fromkeys(rejected)) or "none"}. '
        'Install one, or name it: make setup PYTHON=/path/to/python3.11'
    )


def venv_works() -> bool:
    """Tell whether ``.venv`` has a supported Python and a pip that runs."""
    found = probe(PYTHON)
    if found is None or found[0] not in SUPPORTED_MINORS:
        return False
    check = [str(PYTHON), '-m', 'pip', '--version']
    return subprocess.run(check, capture_output=True).returncode == 0


def create_venv(shell: Shell) -> None:
    """Create ``.venv``, unless a working one is there."""
    if venv_works():
        return
    for path in VENV.iterdir():
        if path not in (LOG, LOCK):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # Seen from inside a virtual environment, the one it was made from.
    current = getattr(sys, '_base_executable', sys.executable)
    others = [f'python3.{minor}' for minor in SUPPORTED_MINORS]
    shell.run(choose_python([current, *others]), '-m', 'venv', VENV)


def remove_incomplete_packages() -> None:
    """Remove the traces of an interrupted pip, which pip takes for installed.

    pip renames what it replaces to ``~name`` and, as the last thing, lists its own
    ``INSTALLER`` file in ``RECORD``.
    """
    for site in VENV.glob('lib/python3*/site-packages'):
        for path in site.glob('~*'):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for info in site.glob('*.dist-info'):
            record = info / 'RECORD'
            if not record.exists() or '/INSTALLER,' not in record.read_text('utf-8'):
                shutil.rmtree(info)


# ----------------------------------------------------------------------- mmcv


def constrained_version(name: str) -> str:
    """Return the version of a package in the constraints."""
    return re.search(rf'^{name}==(\S+)$', CONSTRAINTS.read_text('utf-8'), re.M)[1]


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
    version = constrained_version('mmcv')
    return f'mmcv-{version}-torch-{torch}-cp{major}{minor}-{platform}-{ops}'


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
    version = constrained_version('mmcv')
    source = folder / 'source'
    if source.exists():
        return source
    shutil.rmtree(folder, ignore_errors=True)
    shell.pip(
        'download', '--no-deps', '--no-build-isolation', '--no-binary', 'mmcv',
        '--dest', folder, f'mmcv=={version}',
    )  # fmt: skip
    shutil.unpack_archive(folder / f'mmcv-{version}.tar.gz', folder)
    unpacked = folder / f'mmcv-{version}'
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


def precompile_headers(shell: Shell, source: Path) -> None:
    """Compile torch's headers once instead of once for each of mmcv's 77 files.

    They take nine tenths of the build. GCC takes a precompiled header that lies
    beside the header itself, if both were compiled with the same options; other
    compilers, and GCC with other options, ignore it.
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


def build_mmcv(shell: Shell, variant: str, target: Path) -> None:
    """Build mmcv's wheel with its ops into ``target``."""
    check_compiler()
    folder = VENV / 'build' / variant
    source = unpack_mmcv(shell, folder)
    precompile_headers(shell, source)
    env = {
        'CFLAGS': BUILD_FLAGS,
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
        shell.run(PYTHON, '-m', 'pip', 'uninstall', '--yes', 'mmcv')
        shell.pip('install', *folder.glob('mmcv-*.whl'))
        shell.run(PYTHON, '-c', 'import mmcv.ops')
    except SetupError:
        shutil.rmtree(folder)
        if not was_cached:
            raise
        shell.log.write('\nThe cached wheel does not work: building a new one.\n')
        install_mmcv(shell)


# ---------------------------------------------------------------------- steps


class Step(NamedTuple):
    """One step of the set-up.

    Attributes:
        name: Name of its stamp.
        title: What the user reads.
        typical: How long it takes, for the user.
        inputs: Files and folders; the step runs again when one changes.
        action: Does the step.
    """

    name: str
    title: str
    typical: str
    inputs: tuple[Path, ...]
    action: Callable[[Shell], None]


def requirement_files(*names: str) -> list[str | Path]:
    """Return pip's arguments for requirement files."""
    files: list[str | Path] = []
    for name in names:
        files += ['-r', REQUIREMENTS / f'{name}.txt']
    return files


def install_torch(shell: Shell) -> None:
    """Install torch and torchvision in one call, so that their builds match."""
    shell.pip('install', 'torch', 'torchvision')


def install_build_tools(shell: Shell) -> None:
    """Install what builds mmcv without build isolation."""
    shell.pip('install', 'setuptools<82', 'wheel', 'ninja', 'psutil')


def install_requirements(shell: Shell) -> None:
    """Install the OpenMMLab packages and the tools for development."""
    lists = requirement_files('runtime', 'det', 'cls', 'sr', 'dev')
    shell.pip('install', *lists)
    shell.pip('install', '--no-deps', *requirement_files('no-deps'))


def install_package(shell: Shell) -> None:
    """Install man_mm; not editable, because mim finds no editable package."""
    shell.pip('install', '--no-deps', '--no-build-isolation', '--force-reinstall', ROOT)
    # Seen from the checkout, this metadata would hide the installed package's.
    shutil.rmtree(ROOT / 'man_mm.egg-info')
    shutil.rmtree(ROOT / 'build')


def all_steps() -> list[Step]:
    """Return the steps that follow the creation of ``.venv``, in their order."""
    lists = tuple(sorted(REQUIREMENTS.glob('*.txt')))
    package = tuple(ROOT / name for name in SOURCES)
    pinned = (CONSTRAINTS,)
    download = '2 to 10 min, a large download'
    build = '15 min on 2 cores, once; 20 s when it was built before'
    return [
        Step('torch', 'torch and torchvision', download, pinned, install_torch),
        Step('build-tools', 'build tools', '10 s', pinned, install_build_tools),
        Step('mmcv', 'mmcv with compiled ops', build, pinned, install_mmcv),
        Step('packages', 'other packages', '1 to 3 min', lists, install_requirements),
        Step('man_mm', 'man_mm itself', '10 s', package, install_package),
    ]


def fingerprint(paths: Iterable[Path]) -> str:
    """Hash the names and contents of files, and of all files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob('*')) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and '__pycache__' not in file.parts:
                digest.update(f'{file.relative_to(ROOT)}\0'.encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def stamp_keys(steps: Iterable[Step], start: str) -> dict[str, str]:
    """Compute what each step's stamp holds when the step is up to date.

    A key includes the one before it: a step that changed runs the later ones, too.
    """
    keys = {}
    for step in steps:
        start = hashlib.sha256(f'{start} {fingerprint(step.inputs)}'.encode())
        start = keys[step.name] = start.hexdigest()
    return keys


def is_stamped(name: str, key: str) -> bool:
    """Tell whether a step was finished with this key."""
    stamp = STAMPS / name
    return stamp.exists() and stamp.read_text('utf-8') == key


def write_stamp(name: str, key: str) -> None:
    """Record that a step is finished."""
    STAMPS.mkdir(exist_ok=True)
    (STAMPS / name).write_text(key, 'utf-8')


def python_key() -> str:
    """Name the Python of ``.venv``; empty if there is none."""
    found = probe(PYTHON)
    return f'Python 3.{found[0]}' if found else ''


def announce(number: int, total: int, title: str, typical: str) -> None:
    """Print the line that starts a step."""
    print(f'[{number}/{total}] {title} (typically {typical})', flush=True)


def set_up(shell: Shell) -> int:
    """Run the steps that are not up to date.

    Returns:
        How many steps ran.
    """
    steps = all_steps()
    total = len(steps) + 1
    ran = 0
    if not (python_key() and is_stamped('venv', python_key())):
        announce(1, total, 'Python environment in .venv', '10 s')
        create_venv(shell)
        write_stamp('venv', python_key())
        ran += 1
    keys = stamp_keys(steps, python_key())
    for number, step in enumerate(steps, 2):
        if is_stamped(step.name, keys[step.name]):
            continue
        begin = time.monotonic()
        announce(number, total, step.title, step.typical)
        remove_incomplete_packages()
        step.action(shell)
        write_stamp(step.name, keys[step.name])
        print(f'      done in {duration(time.monotonic() - begin)}', flush=True)
        ran += 1
    return ran


def lock_venv(lock: TextIO) -> None:
    """Wait until no other set-up works in this checkout."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print('Waiting for another set-up of this checkout to end.', flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def report_failure(error: Exception, log_start: int) -> None:
    """Print what failed, after the end of what was logged since ``log_start``."""
    lines = LOG.read_bytes()[log_start:].decode('utf-8', 'replace').splitlines()
    for line in lines[-LOG_TAIL:]:
        print(f'  | {line}', file=sys.stderr)
    print(f'\nThe set-up failed: {error}', file=sys.stderr)
    if lines:
        print(
            f'Full log: {LOG.relative_to(ROOT)}. Finished steps are kept: the same '
            'command goes on from here.',
            file=sys.stderr,
        )


def main() -> int:
    """Set up the environment and report.

    Returns:
        Exit status: 0, 1 after a failure, 130 after Ctrl-C.
    """
    begin = time.monotonic()
    VENV.mkdir(exist_ok=True)
    with LOCK.open('w') as lock, LOG.open('a', encoding='utf-8') as log:
        lock_venv(lock)
        log_start = log.tell()
        try:
            ran = set_up(Shell(log, lock))
        except (SetupError, subprocess.SubprocessError, OSError) as error:
            report_failure(error, log_start)
            return 1
        except KeyboardInterrupt:
            print('\nInterrupted; the same command goes on from here.')
            return 130
    state = 'is ready' if ran else 'is up to date'
    print(f'The environment in .venv {state} ({duration(time.monotonic() - begin)}).')
    return 0


if __name__ == '__main__':
    sys.exit(main())
