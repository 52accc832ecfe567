import subprocess
import sys

import pytest

from delve_ray.errors import OptionError
from delve_ray.storage import Storage
from delve_ray.writers import (
    Writer,
    WriterRun,
    check_save_to,
    check_writer_args,
    given_writers,
    make_writers,
    open_writers,
)
from tests.windows import window

VALID = "'parquet', 'tensorboard', 'csv', 'npy', 'plot', 'console', 'wandb', 'mlflow'"


@pytest.mark.parametrize(
    ("save_to", "names"),
    [
        ("parquet", ("parquet",)),
        (["parquet"], ("parquet",)),
        (("tensorboard", "parquet"), ("tensorboard", "parquet")),
        (["parquet", "tensorboard", "parquet"], ("parquet", "tensorboard")),
    ],
)
def test_names_and_their_order(save_to, names, tmp_path):
    assert check_save_to(save_to) == names
    assert [writer.name for writer in make_writers(names, WriterRun("run", Storage(tmp_path)))] == list(names)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("parqet", "parquet"), ("TensorBoard", "tensorboard"), ("wandbs", "wandb"), ("ml-flow", "mlflow")],
)
def test_a_misspelt_name(name, meant):
    with pytest.raises(OptionError) as raised:
        check_save_to(name)
    assert str(raised.value) == f"save_to={name!r} is unknown; valid: {VALID}. Did you mean {meant!r}?"


def test_a_name_like_no_other():
    with pytest.raises(OptionError) as raised:
        check_save_to(["xyz"])
    assert str(raised.value) == f"save_to='xyz' is unknown; valid: {VALID}."


@pytest.mark.parametrize("save_to", [[], (), None])
def test_nothing_to_write_to(save_to):
    with pytest.raises(OptionError, match="name at least one of 'parquet', 'tensorboard'"):
        check_save_to(save_to)


class Keeping:
    """A writer as others write them."""

    def __init__(self, name="keeping", fails=None):
        self.name, self.fails, self.calls = name, fails, []

    def open(self, run):
        self.calls.append(("open", run.run))
        if self.fails:
            raise self.fails

    def write(self, window):
        self.calls.append(("write", window.step))

    def write_scalars(self, scalars):
        self.calls.append(("scalars", len(scalars)))

    def close(self):
        self.calls.append(("close",))


@pytest.mark.parametrize(
    ("save_to", "names"),
    [
        (["print", "console"], ("console",)),
        ("tb", ("tensorboard",)),
        (["plot", "plotcsv"], ("plot", "csv")),
        ("csvplot", ("csv", "plot")),
        (["parquet", "csvplotting", "csv"], ("parquet", "csv", "plot")),
    ],
)
def test_delves_other_names(save_to, names, tmp_path):
    assert check_save_to(save_to) == names
    given = [save_to] if isinstance(save_to, str) else save_to
    assert [writer.name for writer in make_writers(given, WriterRun("run", Storage(tmp_path)))] == list(names)


@pytest.mark.parametrize(
    ("args", "save_to", "found"),
    [
        ({"print": {"table": True}}, ("console",), {"console": {"table": True}}),
        ({"figsize": (9, 5), "fontsize": 12}, ("csv", "plot"), {"plot": {"figsize": (9, 5), "fontsize": 12}}),
        (
            {"plotcsv": {"fontsize": 12}, "zip": True},
            ("csv", "plot", "npy"),
            {"plot": {"fontsize": 12}, "npy": {"zip": True}},
        ),
        ({"figsize": {"a": 1}}, ("figsize",), {"figsize": {"a": 1}}),
    ],
)
def test_delves_way_of_giving_options(args, save_to, found):
    assert check_writer_args(args, save_to) == found


def test_an_object_beside_names(tmp_path):
    writer = Keeping()
    save_to = ["parquet", writer]
    assert isinstance(writer, Writer)
    assert check_save_to(save_to) == ("parquet", "keeping")
    assert given_writers(save_to) == (writer,)
    run = WriterRun("mine", Storage(tmp_path))
    made = make_writers(("parquet", "keeping"), run, {}, (writer,))
    assert made[1] is writer
    assert writer.calls == []
    assert open_writers(made, run) == made
    assert writer.calls == [("open", "mine")]


def test_what_one_writer_refuses_closes_the_others(tmp_path):
    first, second = Keeping("first"), Keeping("second", fails=OptionError("not here"))
    with pytest.raises(OptionError, match="not here"):
        open_writers([first, second], WriterRun("run", Storage(tmp_path)))
    assert first.calls == [("open", "run"), ("close",)]


def test_a_writer_that_cannot_be_opened_now_is_opened_later(tmp_path):
    """As where a store is restarted while a service is away: the other writers go on."""
    first, second = Keeping("first"), Keeping("second", fails=RuntimeError("no network"))
    run = WriterRun("run", Storage(tmp_path))
    _, waiting = open_writers([first, second], run, later=True)
    assert waiting.name == "second"
    for call in (lambda: waiting.write(window(step=3)), lambda: waiting.write_scalars([])):
        with pytest.raises(OSError, match="it cannot be opened: no network"):
            call()
    second.fails = None
    waiting.write(window(step=3))
    waiting.write_scalars([])
    waiting.close()
    assert second.calls[-4:] == [("open", "run"), ("write", 3), ("scalars", 0), ("close",)]
    with pytest.raises(OptionError, match="save_to='second' cannot begin: RuntimeError: no network"):
        open_writers([Keeping("second", fails=RuntimeError("no network"))], run)


@pytest.mark.parametrize(
    ("save_to", "words"),
    [
        (object(), "is no writer, it lacks name, open, write, write_scalars, close"),
        (["parquet", 3], "save_to=3 is no writer, it lacks name, open"),
        (Keeping, "the class Keeping is no writer, it lacks name"),
        (Keeping(name=""), "it lacks name"),
        ([Keeping(), Keeping()], "two writers are called 'keeping'"),
        ([Keeping("parquet")], "two writers are called 'parquet'"),
    ],
)
def test_what_is_no_writer(save_to, words):
    with pytest.raises(OptionError, match=words):
        check_save_to(save_to)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"project": "x"}, r"writer_args has 'project'; give options by the writer's name, such as \{'csv': "),
        ({"wandb": {}}, "save_to has 'csv'"),
        ({"csv": 3}, "writer_args has 'csv'"),
        ({"plotcsv": {}}, "writer_args has 'plotcsv'; .* save_to has 'csv'"),
        ({"fontsize": 3}, "writer_args has 'fontsize', an option of 'plot', and save_to has 'csv'; leave it out"),
        ({"primary_metric": "loss"}, "writer_args has 'primary_metric', which no writer takes: .* read_scalars"),
        ("csv", "writer_args is a str"),
    ],
)
def test_options_of_no_writer(args, words):
    with pytest.raises(OptionError, match=words):
        check_writer_args(args, ("csv",))


def test_options_that_a_writer_does_not_take(tmp_path):
    with pytest.raises(OptionError, match=r"writer_args=\{'console': \{'colour': 1\}\} does not fit: .*colour"):
        make_writers(("console",), WriterRun("run", Storage(tmp_path)), {"console": {"colour": 1}})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with writers, as pip would install it."""
    (tmp_path / "own_writers.py").write_text(
        "from tests.writers.test_writers import Keeping\n"
        "def make(colour='red'):\n    writer = Keeping('whatever')\n    writer.colour = colour\n    return writer\n"
    )
    information = tmp_path / "own_writers-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: own-writers\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[delve_ray.writers]\nown = own_writers:make\nbroken = own_writers:absent\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_writer_of_another_package(package, tmp_path):
    assert check_save_to(["parquet", "own"]) == ("parquet", "own")
    run = WriterRun("run", Storage(tmp_path / "run"))
    (writer,) = make_writers(("own",), run, {"own": {"colour": "blue"}})
    assert (writer.name, writer.colour, writer.calls) == ("own", "blue", [])
    with pytest.raises(OptionError, match="save_to='broken': the package that has it cannot be imported"):
        make_writers(("broken",), run)


def test_a_writer_imports_only_what_it_needs(tmp_path):
    code = (
        "import sys; from delve_ray.writers import WriterRun, make_writers; from delve_ray.storage import Storage\n"
        f"make_writers(['parquet', 'csv', 'npy', 'plot', 'console'], WriterRun('run', Storage({str(tmp_path)!r})))\n"
        "print(sorted({'torch', 'ray', 'tensorboardX', 'wandb', 'mlflow', 'matplotlib'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("mlflow", "mlflow.entities")])
def test_a_writer_whose_package_is_missing(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OptionError, match=rf"save_to='{name}' needs {name} .*pip install 'delve_ray\[{name}\]'"):
        run = WriterRun("run", Storage(tmp_path))
        open_writers(make_writers((name,), run), run)
