"""Are the lower bounds in pyproject.toml true? Installs exactly them into a fresh environment and runs the fast tests.

    python benchmarks/lower_bounds.py [--folder FOLDER] [TEST...]          # some GB and an hour on two cores

What pyproject.toml does not name is the newest that fits. An environment that is in the folder already is used again
and only brought to the bounds.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def lower_bounds() -> list[str]:
    """["torch==2.11", ...] of all that the package and its tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = list(project["dependencies"])
    for requirement in extras["test"]:
        others = re.fullmatch(r"hf-mim\[(.+)]", requirement)  # of which it holds all
        requirements += [r for name in others[1].split(",") for r in extras[name]] if others else [requirement]
    return [requirement.replace(">=", "==") for requirement in requirements]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code of pip, or of the tests."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tests", nargs="*", help="as of pytest; all fast ones by default")
    parser.add_argument("--folder", type=Path, help="where the environment is kept; a temporary one by default")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "lower-bounds"
        if not folder.is_dir():
            venv.create(folder, with_pip=True)
        python = str(folder / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        installed = subprocess.run([python, "-m", "pip", "install", *lower_bounds(), "-e", str(ROOT)])
        if installed.returncode:
            return installed.returncode
        return subprocess.run([python, "-m", "pytest", "-m", "not slow", *args.tests], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
