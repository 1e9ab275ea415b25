"""What a user gets: one importable name, everything in it once, and a guard against a second copy."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("modeling", "training", "model_cards")
FOLDERS = ("hf_mim", *MAPPED, "tests", "benchmarks", "docs")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "mkdocs.yml", ".ci/run", "LICENSE")
SOURCES = (*FOLDERS, *FILES, "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
IMPORT_ALL = """
import importlib, pathlib, pkgutil, hf_mim
names = [module.name for module in pkgutil.walk_packages(hf_mim.__path__, "hf_mim.")]
for name in names:
    if not name.endswith(".__main__"):
        importlib.import_module(name)
print(pathlib.Path(hf_mim.__file__).parent, len(names))
"""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]


def run_python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    """Runs this Python in `cwd`, which then comes first among the places it imports from, or after `path`."""
    # An installed hf_mim must not answer for the one under test, so the environment is set and not extended.
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def build_wheel(source: Path, out: Path) -> Path:
    # --no-build-isolation: the build must not fetch setuptools from the network.
    command = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out))
    done = run_python(*command, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout: building writes into the tree, and what lies in build/ would be packaged."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
        else:
            (copy / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def expected_files() -> set[str]:
    """What the wheel should hold, by a plain walk of the folders: every module, and the data."""
    own = {path for path in ROOT.glob("hf_mim/**/*.py") if not any(part in MAPPED for part in path.parts[-2:-1])}
    files = {path.relative_to(ROOT).as_posix() for path in own}
    files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_mim/data/fashion_mnist").iterdir()}
    files |= {
        "hf_mim/analysis/report.html",
        "hf_mim/demo/page.html",
        *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("hf_mim/new/*.txt")),
    }
    for pattern in ("modeling/*.py", "training/**/*.py", "training/recipes/*.yaml", "model_cards/*.md"):
        files |= {f"hf_mim/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob(pattern)}
    return files


def count_modules() -> int:
    """How many modules and packages there are below hf_mim; files outside a package are scripts."""
    files = expected_files()
    packaged = [name for name in files if name.endswith(".py") and f"{name.rpartition('/')[0]}/__init__.py" in files]
    return len(packaged) - 1


def test_hf_mim_is_the_only_top_level_name(names):
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hf_mim"}


def test_wheel_holds_every_file_once(names):
    packaged = [name for name in names if ".dist-info/" not in name]
    assert len(packaged) == len(set(packaged))
    assert set(packaged) == expected_files()


@pytest.mark.parametrize(
    "path",
    [
        "hf_mim/__main__.py",
        "hf_mim/modeling/__init__.py",
        "hf_mim/training/__init__.py",
        "hf_mim/training/recipes/quick.yaml",
        "hf_mim/data/fashion_mnist/train.parquet",
        "hf_mim/data/fashion_mnist/LICENSE",
        "hf_mim/model_cards/README.md",
    ],
)
def test_wheel_includes(names, path):
    assert path in names


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 12e6  # most of it images


def test_the_version_is_the_newest_of_the_changelog_and_the_package():
    headings = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    [declared] = re.findall(r'__version__ = "(.*)"', (ROOT / "hf_mim/__init__.py").read_text())
    assert PROJECT["version"] == declared == headings[0]


def test_wheel_declares_the_command_and_the_licences(wheel, names):
    [entry_points] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    with zipfile.ZipFile(wheel) as archive:
        assert "hf-mim = hf_mim.cli:main" in archive.read(entry_points).decode()
    assert sum("/licenses/" in name for name in names) == 2


@pytest.mark.slow
def test_every_module_of_an_installed_wheel_imports(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = ("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    done = run_python(*command, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    done = run_python("-c", IMPORT_ALL, cwd=elsewhere, path=target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(target / "hf_mim"), str(count_modules())]
    done = run_python("-m", "hf_mim", "recipes", cwd=elsewhere, path=target)
    assert done.returncode == 0, done.stderr
    assert "quick" in done.stdout


@pytest.mark.slow
def test_every_module_of_an_uninstalled_checkout_imports(source):
    done = run_python("-c", IMPORT_ALL, cwd=source)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(source / "hf_mim"), str(count_modules())]


def test_source_distribution_is_complete(source, tmp_path):
    done = run_python("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})", cwd=source)
    assert done.returncode == 0, done.stderr
    [built] = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        members = {member.partition("/")[2] for member in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    # The links in hf_mim/ are left out: they are for a checkout, and a source distribution is installed.
    own = [path for folder in FOLDERS for path in (source / folder).rglob("*") if path.is_file()]
    files = {path.relative_to(source).as_posix() for path in own} | set(SOURCES) - set(FOLDERS)
    files = {name for name in files if "__pycache__" not in name and ".egg-info" not in name}
    assert files <= members
    [unpacked] = [path for path in tmp_path.iterdir() if path.is_dir()]
    with zipfile.ZipFile(build_wheel(unpacked, tmp_path)) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected_files()


@pytest.mark.parametrize("name", ["modeling", "training"])
def test_importing_the_folder_itself_says_what_to_import(name):
    done = run_python("-c", f"import {name}", cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: ")
    assert f"'import hf_mim.{name}'" in done.stderr


@pytest.mark.parametrize("name", MAPPED)
def test_links_are_relative(name):
    link = ROOT / "hf_mim" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_uninstalled_checkout_loads_each_file_once():
    code = (
        "import collections, os, sys, hf_mim.training, hf_mim.modeling.configuration_mim;"
        "files = [os.path.realpath(m.__file__) for m in list(sys.modules.values()) if getattr(m, '__file__', None)];"
        f"ours = collections.Counter(file for file in files if file.startswith({str(ROOT / 'modeling')!r}));"
        "print(max(ours.values()), hf_mim.modeling.configuration_mim.__name__)"
    )
    done = run_python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "hf_mim.modeling.configuration_mim"]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_dependencies_have_lower_bounds_only_and_are_met(requirement):
    assert [bound.operator for bound in requirement.specifier] == [">="]
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_ci_runs_the_documented_test_command():
    command = 'pip install -e ".[test]" && pytest'
    assert command in (ROOT / "README.md").read_text()
    assert command in (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_changelog_opens_with_what_is_unreleased():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"


def test_links_of_the_documentation_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")]
    links = {(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())}
    for page, link in links:
        path, _, anchor = link.partition("#")
        if link.startswith(("https://", "http://")):
            continue
        target = page.parent / path if path else page
        assert target.exists(), (page.name, link)
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, (page.name, link)
    assert len(links) > 100
