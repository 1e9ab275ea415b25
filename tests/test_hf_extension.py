"""The Hub's own command runs `hf mim ...` where the project is installed as its extension."""

import datetime
import shutil
import subprocess
import sys

import pytest

import hf_mim


def test_the_executable_is_what_an_extension_of_the_hub_client_has_to_be(tmp_path, monkeypatch):
    extensions = pytest.importorskip("huggingface_hub.cli.extensions")
    script = shutil.which("hf-mim")
    if script is None:
        pytest.skip("a checkout that is not installed has no executable")
    monkeypatch.setenv("HOME", str(tmp_path))
    # What `hf extensions install OWNER/hf-mim` leaves: a folder of that name, and where the executable is.
    manifest = extensions.ExtensionManifest(
        "owner", "hf-mim", "owner/hf-mim", "mim", script, "python", datetime.datetime.now(datetime.UTC)
    )
    manifest.save(extensions.EXTENSIONS_ROOT.expanduser() / "hf-mim")
    assert extensions._get_executable_name("mim").removesuffix(".exe") == "hf-mim"
    command = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", "mim", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"hf-mim {hf_mim.__version__}" in done.stdout, done.stderr
