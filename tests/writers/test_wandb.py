import json
import struct
import threading
import time

import pytest

from delve_ray.schema import window_metrics
from delve_ray.storage import Storage
from delve_ray.writers import WriterRun
from tests.windows import layer_row, scalar, window

pytest.importorskip("wandb")

pytestmark = pytest.mark.slow


def opened(tmp_path, **options):
    from delve_ray.writers.wandb import WandbWriter

    writer = WandbWriter(mode="offline", project="tests", **options)
    run = WriterRun("cnn", Storage(tmp_path), "t1", {"lr": 0.1, "width": 8}, {"num_parameters": 42})
    writer.open(run)
    return writer


def payloads(data):
    """The records of a .wandb file: after a header of 7 bytes a log in the format of LevelDB."""
    assert data[:4] in (b":W&B", b"")
    record, position = b"", 7
    while position + 7 <= len(data):
        left = 32768 - position % 32768  # of a block; what is shorter than a record's header is padding
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if position + 7 + length > len(data):
            return  # not yet written to its end
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield record
            record = b""


def parsed(path):
    """The records of a .wandb file once it is whole: W&B's own process closes it some time after `finish` returned."""
    from wandb.proto import wandb_internal_pb2

    until = time.monotonic() + 60
    while True:
        found = []
        for data in payloads(path.read_bytes()):
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(data)
        if found and found[-1].HasField("exit"):
            return found
        assert time.monotonic() < until, f"{path} has no end: {[each.WhichOneof('record_type') for each in found]}"
        time.sleep(0.05)


def records(tmp_path):
    """What the offline files hold, run by run: its name and id, its config, and the rows that were logged."""
    found = []
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        rows, config, about = [], {}, {}
        for record in parsed(path):
            if record.HasField("run"):
                about = {"name": record.run.display_name, "id": record.run.run_id}
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        found.append((about, config, rows))
    return found


def test_every_metric_with_its_step(tmp_path):
    writer = opened(tmp_path)
    windows = [
        window([layer_row("a"), layer_row("b.c", "eval", stats={"saturation": 0.1 * n})], step=n) for n in (2, 4)
    ]

    def write():  # as the store does, on a thread of its own
        for each in windows:
            writer.write(each)
        writer.write(window([layer_row("live")], final=False))
        writer.write_scalars([scalar("accuracy", 0.9, step=3)])
        writer.close()

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    ((about, config, rows),) = records(tmp_path)
    assert about["name"] == "cnn"
    assert (config["lr"], config["model"]["num_parameters"]) == (0.1, 42)
    for row, each, step in zip(rows, windows, (2, 4), strict=False):
        assert {key: value for key, value in row.items() if not key.startswith("_")} == {
            **window_metrics(each.rows),
            "delve_ray/step": step,
        }
    assert {key: value for key, value in rows[2].items() if not key.startswith("_")} == {
        "accuracy": 0.9,
        "delve_ray/step": 3,
    }
    assert len(rows) == 3


def test_a_restarted_store_goes_on_with_the_run(tmp_path):
    for step in (0, 1):
        time.sleep(1.1)  # offline, a run's folder is named by the second
        writer = opened(tmp_path)
        writer.write(window([layer_row()], step=step))
        writer.close()
    found = records(tmp_path)
    assert len({about["id"] for about, *_ in found}) == 1
    assert {row["delve_ray/step"] for *_, rows in found for row in rows} == {0, 1}
