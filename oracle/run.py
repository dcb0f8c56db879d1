"""Make an environment with the peers' attacks and compare ours with theirs: what `make oracle` runs.

torchattacks and ART pin old packages, so they never share an environment with the project. Usage:
python oracle/run.py [--environment FOLDER] [what compare.py takes]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent


def main() -> int:
    """Make the environment if its list of packages has changed, then run the comparison in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, default=REPOSITORY / "build" / "oracle")
    options, rest = parser.parse_known_args()
    python = prepared(options.environment)
    # The tree is put on the path, not installed: the project's own dependencies stay out of this environment.
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([str(python), str(HERE / "compare.py"), *rest], env=environment).returncode


def prepared(folder: Path) -> Path:
    """The interpreter of an environment that holds what requirements.txt names."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted, stamp = (HERE / "requirements.txt").read_text(), folder / "installed.txt"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(HERE / "requirements.txt")]
        subprocess.run(install, check=True)
        stamp.write_text(wanted)
    return python


if __name__ == "__main__":
    sys.exit(main())
