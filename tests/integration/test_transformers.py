"""Transformers: the real Trainer on the README's text, alone and with two of Ray Train's workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import delve_ray
from tests.events import tag_values

pytest.importorskip("accelerate")

pytestmark = pytest.mark.slow

KEY = "saturation/eval/mean"
LENGTH = 32


def texts() -> list[list[int]]:
    """Lines of the README as bytes, of different lengths."""
    readme = Path(__file__).parents[2] / "README.md"
    lines = [line.encode()[:LENGTH] for line in readme.read_text(encoding="utf-8").splitlines()]
    return [list(line) for line in lines if len(line) > 4][:96]


def examples(labels: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Padded to one length, with masks; 64 to train on and 32 to evaluate."""
    import torch

    found = []
    for index, line in enumerate(texts()):
        ids = torch.tensor(line + [0] * (LENGTH - len(line)))
        mask = (torch.arange(LENGTH) < len(line)).long()
        target = torch.tensor(index % 2) if labels else torch.where(mask.bool(), ids, -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": target})
    assert len(found) == 96
    return found[:64], found[64:]


def tokens(data: list[dict[str, Any]]) -> int:
    return sum(int(example["attention_mask"].sum()) for example in data)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2))


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=256, num_labels=2, **sizes))


def trainer_of(model: Any, folder: Path | str, callbacks: list[Any], labels: bool, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    } | options
    train, test = examples(labels)
    return Trainer(
        model, TrainingArguments(str(folder), **arguments), train_dataset=train, eval_dataset=test, callbacks=callbacks
    )


def test_gpt2_without_its_padding(tmp_path: Path) -> None:
    from delve_ray.integrations.transformers import SaturationCallback

    model = gpt2()
    callback = SaturationCallback(layers=["transformer.h.*"])
    trainer = trainer_of(model, tmp_path, [callback], labels=False)
    trainer.train()
    run = tmp_path / "saturation"
    train, test = examples(labels=False)
    rows = delve_ray.read_spectra(run).to_pylist()
    assert {(r["phase"], r["step"], r["samples"]) for r in rows} == {
        (phase, step, tokens(data)) for step in (4, 8) for phase, data in (("train", train), ("eval", test))
    }
    assert tokens(train) < 64 * LENGTH, "there is padding"
    logged = {entry["step"]: entry for entry in trainer.state.log_history if KEY in entry}
    for step in (4, 8):
        for phase in ("train", "eval"):
            key = f"saturation/{phase}/mean"
            of_step = [r["saturation"] for r in rows if (r["phase"], r["step"]) == (phase, step)]
            assert len(of_step) == len({r["layer"] for r in rows})
            mean = sum(of_step) / len(of_step)
            assert logged[step][key] == pytest.approx(mean, rel=1e-12)
            assert tag_values(run, key)[step] == pytest.approx(mean, rel=1e-6)
    assert callback.tracker is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bert_by_steps(tmp_path: Path) -> None:
    """The pooler and the classifier see one row per text, of which none is padding."""
    from delve_ray.integrations.transformers import SaturationCallback

    callback = SaturationCallback(save_to="parquet", every_n_steps=3, metrics=None)
    trainer = trainer_of(bert(), tmp_path, [callback], labels=True, eval_strategy="no")
    trainer.train()
    rows = delve_ray.read_spectra(tmp_path / "saturation").to_pylist()
    samples = {(row["step"], row["layer"]): row["samples"] for row in rows}
    assert {step for step, _ in samples} == {3, 6, 8}
    for layer in ("bert.pooler.dense", "classifier"):
        assert [samples[step, layer] for step in (3, 6, 8)] == [48, 48, 32]
    inner = [samples[step, "bert.encoder.layer.0.output.dense"] for step in (3, 6, 8)]
    assert sum(inner) == 2 * tokens(examples(labels=True)[0])
    assert not any(KEY in entry for entry in trainer.state.log_history)


def test_a_training_that_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    from delve_ray.integrations.transformers import SaturationCallback

    def trainer(epochs: int) -> Any:
        callback = SaturationCallback(save_to="parquet", layers=["classifier"])
        options = {"num_train_epochs": epochs, "save_strategy": "epoch"}
        return trainer_of(bert(), tmp_path, [callback], labels=True, **options)

    trainer(1).train()
    trainer(2).train(resume_from_checkpoint=True)
    rows = delve_ray.read_spectra(tmp_path / "saturation", filters=[("phase", "==", "train")]).to_pylist()
    assert [(row["attempt"], row["step"], row["samples"]) for row in rows] == [(0, 4, 64), (1, 8, 64)]
    trainer(1).train()  # another training, which has a directory of its own
    rows = delve_ray.read_spectra(tmp_path / "saturation-1", filters=[("phase", "==", "train")]).to_pylist()
    assert [(row["attempt"], row["step"]) for row in rows] == [(0, 4)]


def test_several_evaluations_are_one_window(tmp_path: Path) -> None:
    from delve_ray.integrations.transformers import SaturationCallback

    callback = SaturationCallback(save_to="parquet", layers=["classifier"])
    trainer = trainer_of(bert(), tmp_path, [callback], labels=True)
    trainer.eval_dataset = {"first": trainer.eval_dataset[:10], "second": trainer.eval_dataset[10:]}
    trainer.train()
    rows = delve_ray.read_spectra(tmp_path / "saturation", filters=[("phase", "==", "eval")]).to_pylist()
    assert [(row["step"], row["samples"]) for row in rows] == [(4, 32), (8, 32)]
    assert [entry["step"] for entry in trainer.state.log_history if KEY in entry] == [4, 8]


def test_an_encoders_mask_is_not_that_of_its_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    from delve_ray.integrations.transformers import SaturationCallback

    config = T5Config(vocab_size=256, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    callback = SaturationCallback(save_to="parquet", layers=["decoder.block.0.layer.2.*", "!*.dropout", "!*.act"])
    trainer = trainer_of(T5ForConditionalGeneration(config), tmp_path, [callback], labels=False, eval_strategy="no")
    trainer.train()
    samples = set(delve_ray.read_spectra(tmp_path / "saturation").column("samples").to_pylist())
    assert samples == {64 * LENGTH}, "every position of the decoder, as nobody says which are padding"


def train(config: dict[str, Any]) -> None:
    """One of Ray Train's workers."""
    import ray.train
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer

    from delve_ray.integrations.transformers import SaturationCallback

    callbacks = [SaturationCallback(layers=["transformer.h.*"]), RayTrainReportCallback()]
    folder = f"{config['folder']}/{ray.train.get_context().get_world_rank()}"
    prepare_trainer(trainer_of(gpt2(), folder, callbacks, labels=False, save_strategy="epoch")).train()


@pytest.mark.ray
def test_two_workers_of_ray_train(ray_session: None, tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    result = TorchTrainer(
        train,
        train_loop_config={"folder": str(tmp_path / "out")},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="transformers", storage_path=str(tmp_path)),
    ).fit()
    run = tmp_path / "transformers" / "saturation"
    rows = delve_ray.read_spectra(run).to_pylist()
    train_data, test_data = examples(labels=False)
    assert {(r["phase"], r["step"], r["samples"], r["workers"]) for r in rows} == {
        (phase, step, tokens(data), 2)
        for step in (2, 4)
        for phase, data in (("train", train_data), ("eval", test_data))
    }
    last = [r["saturation"] for r in rows if (r["phase"], r["step"]) == ("eval", 4)]
    mean = sum(last) / len(last)
    assert result.metrics[KEY] == pytest.approx(mean, rel=1e-12)
    assert tag_values(run, KEY)[4] == pytest.approx(mean, rel=1e-6)
