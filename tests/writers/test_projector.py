"""Embeddings where TensorBoard's projector finds them, read back with its own code."""

import numpy as np
from google.protobuf import text_format
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from delve_ray.storage import Storage
from delve_ray.writers.tensorboard import TensorBoardWriter
from tests.windows import HOSTILE_NAMES, layer_row, window

POINTS = np.array([[1.5, -2.0], [1e-300, 0.1 + 0.2], [3e200, 0.0]])


def listed(tmp_path):
    """Points by name, as the projector reads them: a path in the configuration is meant from its own folder."""
    config = ProjectorConfig()
    folder = tmp_path / "tensorboard"
    text_format.Parse((folder / "projector_config.pbtxt").read_text(), config)
    return {each.tensor_name: np.loadtxt(folder / each.tensor_path, ndmin=2) for each in config.embeddings}


def test_the_last_points_of_each_phase_and_layer(tmp_path):
    writer = TensorBoardWriter(Storage(tmp_path))
    writer.write(
        window([layer_row("a", embedding=POINTS), layer_row("b"), layer_row("a", "eval", embedding=POINTS[:1])])
    )
    assert {name: points.tolist() for name, points in listed(tmp_path).items()} == {
        "train/a": POINTS.tolist(),
        "eval/a": POINTS[:1].tolist(),
    }
    writer.write(window([layer_row("a", embedding=POINTS[1:])], step=4, final=False))  # live: not shown
    writer.close()
    again = TensorBoardWriter(Storage(tmp_path))  # as a restarted store has it
    again.write(window([layer_row("a", embedding=POINTS[1:]), layer_row("c", embedding=POINTS)], step=5))
    again.close()
    found = listed(tmp_path)
    assert set(found) == {"train/a", "eval/a", "train/c"}
    assert found["train/a"].tolist() == POINTS[1:].tolist()


def test_names_of_any_kind(tmp_path):
    writer = TensorBoardWriter(Storage(tmp_path))
    for _ in range(2):
        writer.write(window([layer_row(name, embedding=POINTS) for name in HOSTILE_NAMES]))
    writer.close()
    assert set(listed(tmp_path)) == {f"train/{name}" for name in HOSTILE_NAMES}


def test_without_embeddings_there_is_no_projector(tmp_path):
    writer = TensorBoardWriter(Storage(tmp_path))
    writer.write(window([layer_row("a")]))
    writer.close()
    assert not list((tmp_path / "tensorboard").glob("projector*"))
