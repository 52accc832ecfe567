import subprocess
import sys

import pytest

from delve_ray.errors import OptionError
from delve_ray.storage import Storage
from delve_ray.writers import check_save_to, make_writers


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
    assert [writer.name for writer in make_writers(save_to, Storage(tmp_path))] == list(names)


@pytest.mark.parametrize("name", ["csv", "npy", "console", "print", "plot"])
def test_writers_that_are_still_to_come(name):
    with pytest.raises(NotImplementedError, match=f"save_to='{name}' is not available yet.*'parquet', 'tensorboard'"):
        check_save_to(["parquet", name])


@pytest.mark.parametrize(("name", "meant"), [("parqet", "parquet"), ("TensorBoard", "tensorboard")])
def test_a_misspelt_name(name, meant):
    with pytest.raises(OptionError) as raised:
        check_save_to(name)
    assert str(raised.value) == (
        f"save_to={name!r} is unknown; valid: 'parquet', 'tensorboard'. Did you mean {meant!r}?"
    )


def test_a_name_like_no_other():
    with pytest.raises(OptionError) as raised:
        check_save_to(["xyz"])
    assert str(raised.value) == "save_to='xyz' is unknown; valid: 'parquet', 'tensorboard'."


@pytest.mark.parametrize("save_to", [[], (), None])
def test_nothing_to_write_to(save_to):
    with pytest.raises(OptionError, match="name at least one of 'parquet', 'tensorboard'"):
        check_save_to(save_to)


@pytest.mark.parametrize("save_to", [object(), [object()], ["parquet", 3]])
def test_writer_instances(save_to):
    with pytest.raises(NotImplementedError, match="writer instances cannot be given yet"):
        check_save_to(save_to)


def test_a_writer_imports_only_what_it_needs(tmp_path):
    code = (
        "import sys; from delve_ray.writers import make_writers; from delve_ray.storage import Storage\n"
        f"make_writers('parquet', Storage({str(tmp_path)!r}))\n"
        "print(sorted({'torch', 'ray', 'tensorboardX'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
