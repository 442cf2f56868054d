"""What a killed process runs; importing it warms up a server to fork from."""

import gc
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from mmengine.hooks import Hook
from short_runs import build_runner, train

from man_mm.interruptions import resume_hook

torch.set_num_threads(1)
with TemporaryDirectory() as _folder:  # a first run imports much
    train(Path(_folder), iters=1)
gc.freeze()  # or each fork would copy all of it when it collects garbage


class ReportHook(Hook):
    """Tells the parent that an iteration begins."""

    priority = 'HIGHEST'

    def __init__(self, pipe):
        self.pipe = pipe

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.pipe.send('iteration')


def die_in_save(pipe, call):
    """Dies at a call by which a file is written; half of the file is there by then."""
    left = [call]

    def count(function):
        def counting(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if isinstance(args[0], int) and os.fstat(args[0]).st_size > 4096:
                    os.truncate(args[0], os.fstat(args[0]).st_size // 2)
                pipe.send(f'killed in save, before {function.__name__}')
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counting

    for name in ('fsync', 'replace', 'unlink'):
        setattr(os, name, count(getattr(os, name)))


def attempt(pipe, work_dir, call=None, restore=True, **kwargs):
    """Trains from the last checkpoint; dies in a save if told at which call."""
    if not restore:  # the control
        resume_hook.seed = lambda runner, iteration: None
    runner = build_runner(work_dir, **kwargs)
    runner.register_hook(ReportHook(pipe))
    if call is not None:
        die_in_save(pipe, call)
    runner.train()
    pipe.send('done')
