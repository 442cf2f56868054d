"""Imports mmagic's models, or explains why they cannot be imported.

Named in ``custom_imports`` of super-resolution configs. Without it, mmengine goes on
after a failed import, and says only that a class is not in its registry.
"""

from __future__ import annotations

import importlib

_INSTALL = (
    "pip install '.[sr]' in man_mm's checkout, then pip install --no-deps "
    "'mmagic>=1.2.0' (without its dependencies, as super-resolution needs neither "
    'mediapipe nor the packages for faces)'
)


def import_mmagic() -> None:
    """Imports ``mmagic.models``.

    Raises:
        RuntimeError: If that fails; the message names the package at fault and what
            to install. (mmengine would hide the text of an ``ImportError``.)
    """
    try:
        importlib.import_module('mmagic.models')
    except (ImportError, AssertionError, AttributeError) as error:
        package = (getattr(error, 'name', None) or '').partition('.')[0]
        fault = f'because of the package {package!r}: {error}' if package else error
        raise RuntimeError(
            f'mmagic cannot be imported, {fault}. Install what it needs: {_INSTALL}.'
        ) from error


import_mmagic()
