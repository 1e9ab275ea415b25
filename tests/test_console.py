"""What is printed is text, whatever the names; and a run whose output ends before it does ends with a checkpoint."""

import io
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_pretrain import TINY

from hf_mim import cli
from hf_mim.training.commands import pretrain as commands
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.common.console import RunConsole, make_table
from hf_mim.training.common.errors import DataError
from hf_mim.training.trainer.saving import last_checkpoint


@given(st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=40))
def test_text_is_printed_as_it_is(text):
    out = io.StringIO()
    console = RunConsole(Console(file=out, width=4000))
    console.log(text)
    console.warn(f"[red]{text}[/red]")
    assert out.getvalue() == f"{text}\n[red]{text}[/red]\n"
    console.show(make_table([text], [[f"[b]{text}"]], title=text))


def test_names_that_the_terminal_lacks_letters_for():
    """A file's name may hold bytes that are no text, and a terminal may know ASCII alone."""
    code = r"from hf_mim.training.common.console import RunConsole; RunConsole().log('caf\u00e9 \udcff [red]')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert printed == rb"caf\xe9 \udcff [red]" + b"\n"


def test_an_error_is_one_line_whatever_the_name(monkeypatch, capsys):
    def fail(*_):
        raise DataError("there is no file a\nb \udcff", "a\nb")

    monkeypatch.setattr(cli.command_words, "check_command", fail)
    assert cli.main(["recipes"]) == 2
    assert capsys.readouterr().err == "error: there is no file a\\nb \\udcff\n"


def test_a_reader_that_leaves_ends_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    step, (reading, writing) = commands.MIMTrainer.training_step, os.pipe()

    def leaving(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.close(reading)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(commands.MIMTrainer, "training_step", leaving)
    before, folder = signal.getsignal(signal.SIGPIPE), tmp_path / "run"
    words = ["training.max_steps=20", "data.max_eval_images=0", f"training.output_dir={folder}"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO(writing, "w"), write_through=True))
        pretrain("quick", [*TINY, *words])
    assert caught.value.code == 141 and signal.getsignal(signal.SIGPIPE) == before
    assert last_checkpoint(folder).name == "checkpoint-4" and (folder / "model.safetensors").is_file()


def test_a_command_that_trains_nothing_ends_quietly():
    code = "from hf_mim.training.common.console import RunConsole\nfor _ in range(10): RunConsole().log('x' * 100_000)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)
    process.stderr.close()
