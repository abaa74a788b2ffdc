"""Where the repository's own files are."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository, with what is new and not ignored."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for line in done.stdout.splitlines() if (path := ROOT / line).is_file()]


def relative(path: Path) -> str:
    """A path as the repository names it."""
    return str(path.relative_to(ROOT))
