import pytest

from delve_ray.schema import window_metrics
from delve_ray.storage import Storage
from delve_ray.writers import WriterRun
from tests.windows import layer_row, scalar, window

pytest.importorskip("mlflow")


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def opened(tmp_path, uri, **options):
    from delve_ray.writers.mlflow import MlflowWriter

    writer = MlflowWriter(tracking_uri=uri, **options)
    config = {"lr": 0.1, "model": {"width": 8}}
    writer.open(WriterRun("cnn", Storage(tmp_path / "run"), "t1", config, {"num_parameters": 42}))
    return writer


def history(uri, run_id, key):
    from mlflow.tracking import MlflowClient

    return [(m.step, m.value) for m in MlflowClient(tracking_uri=uri).get_metric_history(run_id, key)]


def only_run(uri, experiment="delve_ray"):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def test_every_metric_under_its_key(tmp_path, uri):
    writer = opened(tmp_path, uri)
    windows = [
        window([layer_row("a"), layer_row("b.c", "eval", stats={"saturation": 0.1 * n})], step=n) for n in (2, 4)
    ]
    for each in windows:
        writer.write(each)
    writer.write(window([layer_row("live")], final=False))
    writer.write_scalars([scalar("accuracy", 0.9, step=4)])
    writer.close()
    run = only_run(uri)
    assert (run.info.run_name, run.info.status) == ("cnn", "FINISHED")
    assert run.data.params == {"lr": "0.1", "model/width": "8", "num_parameters": "42"}
    assert run.data.tags["trial"] == "t1"
    keys = window_metrics(windows[0].rows)
    assert set(run.data.metrics) == {*keys, "accuracy"}
    for key in keys:
        assert history(uri, run.info.run_id, key) == [
            (n, window_metrics(w.rows)[key]) for n, w in zip((2, 4), windows, strict=True)
        ]
    assert history(uri, run.info.run_id, "accuracy") == [(4, 0.9)]


def test_a_restarted_store_goes_on_with_the_run(tmp_path, uri):
    opened(tmp_path, uri).write(window([layer_row()], step=0))
    again = opened(tmp_path, uri)
    again.write(window([layer_row()], step=1))
    again.close()
    assert [step for step, _ in history(uri, only_run(uri).info.run_id, "trace/train/conv1")] == [0, 1]


def test_into_the_run_of_the_training(tmp_path, uri):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    run_id = client.create_run(client.create_experiment("mine")).info.run_id
    writer = opened(tmp_path, uri, run_id=run_id)
    writer.write(window([layer_row("strange\nname?")]))
    writer.close()
    run = only_run(uri, "mine")
    assert run.info.status == "RUNNING", "it is for the training to end it"
    assert run.data.metrics["trace/train/strange_name_"] == 6.5
