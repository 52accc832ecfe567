from delve_ray.storage import Storage
from delve_ray.writers import WriterRun
from delve_ray.writers.console import ConsoleWriter
from tests.windows import layer_row, scalar, sketched_row, window


def printed(capsys, tmp_path, *windows, **options):
    writer = ConsoleWriter(**options)
    writer.open(WriterRun("cnn", Storage(tmp_path)))
    for each in windows:
        writer.write(each)
    writer.write_scalars([scalar("accuracy", 0.98765432, step=3)])
    writer.close()
    return capsys.readouterr().out


ROWS = [
    layer_row("conv1", stats={"saturation": 0.25, "intrinsic_dimensionality": 4.0}, features=16),
    layer_row("fc", stats={"saturation": 0.75, "intrinsic_dimensionality": 3.0}, features=4),
    layer_row("fc", "eval", stats={"saturation": 0.5, "intrinsic_dimensionality": 2.0}, features=4),
]


def test_a_line_per_phase(capsys, tmp_path):
    assert printed(capsys, tmp_path, window(ROWS, step=3), window(ROWS, step=4, final=False)) == (
        "cnn  step 3  train: saturation 50.0%, from conv1 25% to fc 75%\n"
        "cnn  step 3  eval: saturation 50.0%, from fc 50% to fc 50%\n"
        "cnn  step 3  accuracy: 0.987654\n"
    )


def test_the_layers(capsys, tmp_path):
    assert printed(capsys, tmp_path, window(ROWS[:2], step=3), table=True) == (
        "cnn  step 3  train: saturation 50.0%, from conv1 25% to fc 75%\n"
        "  conv1       4 of 16       25.0%\n"
        "  fc          3 of 4        75.0%\n"
        "cnn  step 3  accuracy: 0.987654\n"
    )


def test_windows_without_a_saturation(capsys, tmp_path):
    nothing = window([layer_row(stats={"saturation": float("nan"), "trace": 1.0}), layer_row("b", "eval", stats={})])
    assert printed(capsys, tmp_path, nothing) == "cnn  step 3  accuracy: 0.987654\n"


def test_sketched_layers_have_their_bounds(capsys, tmp_path):
    rows = [*ROWS[:1], sketched_row("seen", 0.0625), sketched_row("unseen", 9.0)]
    assert printed(capsys, tmp_path, window(rows, step=3), window(rows[2:], step=4), table=True) == (
        "cnn  step 3  train: saturation 16.2%, from seen 8% to conv1 25%; only bounds of unseen 8% to 92%\n"
        "  conv1        4 of 16       25.0%\n"
        "  seen         3 of 40        7.5%\n"
        "  unseen       – of 40      7.5% to 92.5%\n"
        "cnn  step 4  train: only bounds of unseen 8% to 92%\n"
        "  unseen       – of 40      7.5% to 92.5%\n"
        "cnn  step 3  accuracy: 0.987654\n"
    )
