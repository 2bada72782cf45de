"""Progress lines and quiet imports: people see our lines, and nothing stays behind."""

import errno
import io
import logging
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from qflux.io import progress, quiet


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_plain_lines_are_first_last_and_one_in_ten_seconds(capsys, clock):
    with progress.Progress(400, "caching") as bar:
        for _ in range(400):
            clock.now += 0.1
            bar.advance()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "caching 1/400  10.0/s  eta 0:00:40"
    assert lines[-1] == "caching 400/400  10.0/s"
    assert 4 <= len(lines) <= 6


def test_fields_unit_and_a_resumed_count(capsys, clock):
    with progress.Progress(20, "train", unit="samples", done=10) as bar:
        clock.now += 4
        bar.advance(2, loss=0.123456, note="x")
    assert capsys.readouterr().out == "train 12/20  0.500 samples/s  eta 0:00:16  loss 0.1235  note x\n"


def test_a_line_never_ends_a_run():
    code = (
        "import os, sys; from qflux.io.progress import say\n"
        "say('caf\\u00e9 \\udcff'); sys.stdin.readline(); say('lost'); say('lost'); print('on', file=sys.stderr)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        assert process.stdout.readline() == b"caf\\xe9 \\udcff\n"
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b"on\n"
    assert process.returncode == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/full 2>/dev/full"])
def test_whatever_of_the_streams_is_closed_the_code_is_the_same(tmp_path, closed):
    config = Path(__file__).parents[2] / "configs/demo_flux_kontext.yaml"
    words = f"{shlex.quote(sys.executable)} -m qflux.main --config {shlex.quote(str(config))} --check no.key=1 {closed}"
    done = subprocess.run(["sh", "-c", words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr == "" or done.stderr.count("\n") == 1


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    code = (
        "import os; os.close(1); os.close(2)\n"
        "from qflux.io.progress import open_streams\n"
        "open_streams(); file = open('file', 'w'); os.write(1, b'text'); file.write(str(file.fileno() > 2))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == "True"


def test_a_terminal_that_goes_takes_the_bar_with_it(monkeypatch):
    gone = []

    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            if gone:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress.Progress(3, "caching") as bar:
        bar.advance()
        gone.append(True)
        progress.say("a line")
        bar.advance()
    assert progress._bars == []


@pytest.mark.parametrize(("total", "enabled"), [(0, True), (5, False)])
def test_nothing_to_show(capsys, total, enabled):
    with progress.Progress(total, "caching", enabled=enabled) as bar:
        bar.advance()
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal_and_a_line_above_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("TERM", "xterm")
    with progress.Progress(3, "caching") as bar:
        bar.advance(loss=0.5)
        progress.say("a line [of] ours " + "x" * 200)
        bar.advance(2)
    progress.say("after")
    assert "caching" in shown.getvalue()
    assert "3/3" in shown.getvalue()
    assert "a line [of] ours " + "x" * 200 in shown.getvalue()
    assert shown.getvalue().endswith("after\n")
    assert progress._bars == []


def state():
    return (
        dict(os.environ),
        list(warnings.filters),
        warnings.showwarning,
        logging.root.manager.disable,
        logging.root.level,
        list(logging.root.handlers),
        sys.stdout,
        sys.stderr,
        os.fstat(1).st_ino,
        os.fstat(2).st_ino,
    )


def noise():
    print("noise")
    print("noise", file=sys.stderr)
    os.write(1, b"noise\n")
    subprocess.run(["echo", "noise"], check=True)
    warnings.warn("noise")
    logging.getLogger("some.library").critical("noise")
    logging.basicConfig(level=logging.DEBUG, force=True)


def test_nothing_is_shown_and_nothing_stays(capfd):
    before = state()
    with quiet.quiet_imports():
        noise()
        assert os.environ["DIFFUSERS_VERBOSITY"] == "error"
    assert state() == before
    print("shown")
    assert capfd.readouterr() == ("shown\n", "")
    assert logging.getLogger("diffusers").level == logging.ERROR


def test_the_users_verbosity_is_kept(monkeypatch):
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "debug")
    monkeypatch.setattr(logging.getLogger("diffusers"), "level", logging.DEBUG)
    with quiet.quiet_imports():
        assert os.environ["DIFFUSERS_VERBOSITY"] == "debug"
    assert logging.getLogger("diffusers").level == logging.DEBUG


def test_an_error_passes_and_everything_is_restored(capfd):
    before = state()

    def fail():
        with quiet.quiet_imports():
            noise()
            raise ImportError("gone")

    with pytest.raises(ImportError, match="gone"):
        fail()
    assert state() == before


def test_a_stream_kept_by_a_library_works_afterwards(capsys, monkeypatch):
    with quiet.quiet_imports(), quiet.quiet_imports():
        handler = logging.StreamHandler()
        kept = sys.stdout
        print("noise", file=kept)
        assert kept.encoding
    handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "real error", None, None))
    print("said", file=kept, flush=True)
    assert capsys.readouterr() == ("said\n", "real error\n")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    print("later", file=kept)
    assert sys.stdout.getvalue() == "later\n"


def test_threads_quiet_one_after_the_other(capsys):
    from concurrent.futures import ThreadPoolExecutor

    out, err = sys.stdout, sys.stderr

    def work(number):
        with quiet.quiet_imports():
            print("dropped")
        return number

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(64))) == list(range(64))
    assert (sys.stdout, sys.stderr) == (out, err)
    print("shown")
    assert capsys.readouterr().out == "shown\n"
