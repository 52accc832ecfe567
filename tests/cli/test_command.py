"""The command as a process: arguments, exit codes, start-up, terminals, pipes."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from delve_ray.cli import main
from tests.cli.runs import command, publish

COMMANDS = ("summary", "compare", "rank", "export", "recompute", "diagnose", "report", "status", "recover")


def test_help_has_a_line_for_each_command(capsys):
    assert main(["--help"]) == 0
    listed = re.findall(r"^  (\w+)  +(\S.*)\.$", capsys.readouterr().out.partition("Commands:")[2], re.MULTILINE)
    assert [name for name, _ in listed] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_and_json(capsys, name):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "┃" not in out
    assert "│" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], r"Missing command; delve-ray --help .*"),
        (["nonsense"], r"No such command 'nonsense'; delve-ray --help .*"),
        (["summary"], r"Missing argument 'RUN'; delve-ray summary --help .*"),
        (["summary", "x", "--nonsense"], r"No such option: --nonsense.*"),
        (["summary", "x", "--phase", "test"], r".*'test' is not one of 'train', 'eval'; .*"),
        (["summary", "x", "--step", "last"], r".*'--step'.* integer.*"),
        (["recompute", "x", "-t", "ninety"], r".*'--threshold'.* number.*"),
        (["rank", "x", "--mode", "\x1b[31m"], r".*'\\+x1b\[31m'.*"),
    ],
)
def test_what_cannot_be_typed_is_one_sentence(capsys, arguments, sentence):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert re.fullmatch(rf"delve-ray: {sentence}\n", said.err)
    assert said.out == ""


def test_the_version(capsys, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", {"delve_ray": "1.2.3"}.__getitem__)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "delve-ray 1.2.3\n"


def test_the_version_of_what_is_not_installed(capsys, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    assert main(["--version"]) == 2
    assert capsys.readouterr().err == "delve-ray: the package is not installed, so it has no version.\n"


def imported(*commands):
    """What the commands print, one after the other in one process, and the modules that it has imported at the end."""
    program = (
        "import json, sys; from delve_ray.cli import main\n"
        "for arguments in json.loads(sys.argv[1]): assert main(arguments) == 0, arguments\n"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    given = json.dumps([[str(argument) for argument in arguments] for arguments in commands])
    run = subprocess.run([sys.executable, "-c", program, given], capture_output=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.decode("utf-8"), set(run.stderr.decode().split())


def test_summary_is_quick_to_start(tmp_path):
    publish(tmp_path, steps=3)
    out, modules = imported(["summary", tmp_path])
    assert "━" in out
    assert modules.isdisjoint({"torch", "ray", "pandas", "matplotlib", "rich", "scipy", "delve_ray.analysis.recompute"})


def test_help_does_not_even_need_arrow():
    assert imported(["--help"])[1].isdisjoint({"torch", "ray", "pandas", "numpy", "pyarrow"})


def test_questions_to_files_need_neither_torch_nor_ray(tmp_path):
    for run in "ab":
        publish(tmp_path / run, run=run, accuracy=0.5, described={"run": run, "end": None})
    questions = [[name, tmp_path] for name in ("compare", "recompute", "export", "rank", "diagnose")]
    _, modules = imported(*questions, ["summary", tmp_path, "--json"], ["status", tmp_path / "a"])
    assert modules.isdisjoint({"torch", "ray", "matplotlib", "plotly"})


def test_a_terminal_without_box_drawing_gets_a_table(tmp_path):
    run = command("summary", publish(tmp_path), env=os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"})
    assert (run.returncode, run.stderr) == (0, "")
    assert "conv1" in run.stdout


@pytest.mark.parametrize("arguments", [["summary"], ["summary", "--json"], ["export"]])
def test_a_reader_that_leaves_gets_no_traceback(tmp_path, arguments):
    publish(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "delve_ray.cli", *arguments, tmp_path],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(writer)
    assert (run.returncode, run.stderr) == (141, "")


def test_an_interruption_is_130(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("delve_ray.cli.summary.summarize", interrupt)
    assert main(["summary", str(tmp_path)]) == 130


def in_terminal(*arguments, **environment):
    """What a terminal of 100 columns shows, with its escape sequences, and the exit code."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, "-m", "delve_ray.cli", *map(str, arguments)],
        stdout=theirs,
        stderr=theirs,
        stdin=subprocess.DEVNULL,
        env=clean | {"TERM": "xterm-256color"} | environment,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    return process.wait(timeout=120), shown.decode("utf-8")


COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")


def test_colours_are_for_terminals(tmp_path):
    publish(tmp_path, steps=3)
    piped = command("summary", tmp_path, env=os.environ | {"FORCE_COLOR": "1"}).stdout
    code, shown = in_terminal("summary", tmp_path)

    assert code == 0
    assert "\x1b" not in piped
    assert COLOUR.search(shown)
    assert "━" in shown
    code, shown = in_terminal("summary", tmp_path, NO_COLOR="1")
    assert code == 0
    assert "\x1b" in shown  # bold is no colour
    assert not COLOUR.search(shown)


def test_a_bar_moves_on_the_terminal_s_stderr_alone(tmp_path):
    publish(tmp_path, steps=2)
    code, shown = in_terminal("recompute", tmp_path, "--json", "-t", "0.5")
    assert code == 0
    assert "4/4" in shown
    piped = command("recompute", tmp_path, "--json", "-t", "0.5")
    assert (piped.returncode, piped.stderr) == (0, "")
    assert piped.stdout.startswith("[\n")


def test_what_is_exported_to_a_terminal_does_not_steer_it(tmp_path):
    publish(tmp_path, layers=("\x1b[2J\x9b31m",))
    assert "\x1b[2J\x9b31m" in command("export", tmp_path).stdout
    code, shown = in_terminal("export", tmp_path)
    assert code == 0
    assert r"\x1b[2J\x9b31m" in shown
    assert "\x1b[2J" not in shown


def test_paths_are_completed(tmp_path, monkeypatch):
    from delve_ray.cli.complete import complete_path

    for name in ("runs", "runes", ".hidden", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "run.txt").write_text("")
    monkeypatch.chdir(tmp_path)

    assert complete_path("run") == ["runes/", "runs/"]
    assert complete_path(f"{tmp_path}/run") == [f"{tmp_path}/runes/", f"{tmp_path}/runs/"]
    assert complete_path("") == ["other/", "runes/", "runs/"]
    assert complete_path(".") == [".hidden/"]
    assert complete_path("nowhere/x") == []


def test_a_shell_gets_completions(tmp_path):
    (tmp_path / "runs").mkdir()
    environment = {"_DELVE_RAY_COMPLETE": "complete_bash", "COMP_WORDS": "delve-ray summ", "COMP_CWORD": "1"}
    assert command(cwd=tmp_path, env=os.environ | environment).stdout.split() == ["summary"]
    environment |= {"COMP_WORDS": "delve-ray summary ru", "COMP_CWORD": "2"}
    assert command(cwd=tmp_path, env=os.environ | environment).stdout.split() == ["runs/"]
