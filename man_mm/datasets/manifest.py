"""The manifest of a data set that a tool makes: ``dataset.json``, written last.

While a data set is being made, the manifest has the name ``dataset.json.part``, so that
an interrupted run is noticed and done again.
"""

import json
from pathlib import Path


def read_manifest(out: Path, kind: str) -> tuple[dict, str]:
    """Reads what a folder holds.

    Args:
        out: The folder.
        kind: How the recipes of the tool's data sets begin.

    Returns:
        The settings of the finished data set, and why there is none, '' if there is.

    Raises:
        ValueError: If the folder holds files that the tool did not make.
    """
    manifest, part = out / 'dataset.json', out / 'dataset.json.part'
    latest = part if part.is_file() else manifest
    text = latest.read_text('utf-8') if latest.is_file() else ''
    if f'"recipe": "{kind}' not in text:
        if any(out.iterdir()):
            raise ValueError(f'--out {out} holds other files: choose an empty folder')
        return {}, 'new data set'
    if latest == part:
        return {}, 'the last run did not finish'
    return json.loads(text), ''


def begin_manifest(out: Path, settings: dict) -> None:
    """Notes that a data set is being made, and that there is none meanwhile."""
    text = json.dumps(settings, ensure_ascii=False)
    (out / 'dataset.json.part').write_text(text, 'utf-8')
    (out / 'dataset.json').unlink(missing_ok=True)


def finish_manifest(out: Path) -> None:
    """Notes that the data set is complete."""
    (out / 'dataset.json.part').replace(out / 'dataset.json')
