"""The models of these tests, each with data, a loss and a way to train it: small, on real images and real text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence

from tests.models import known, zoo

Batch = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """A model and what is done with it.

    Attributes:
        build: makes the model; the seed is set before.
        training: batches, of different sizes.
        held_out: batches for evaluation.
        loss: of the model and a batch.
        idle: layers that never run, though the model has them.
        windows: how often it is trained and evaluated.
        recomputes: some forwards run once more in the backward pass.
        gradients_in_evaluation: evaluate with autograd on, where torch does without some layers otherwise.
        train_mode: put the model into the mode that it is trained in.
        generate: what an evaluation does besides the losses.
    """

    build: Callable[[], nn.Module]
    training: Callable[[], Sequence[Batch]]
    held_out: Callable[[], Sequence[Batch]]
    loss: Callable[[Any, Batch], Tensor]
    idle: tuple[str, ...] = ()
    windows: int = 2
    recomputes: bool = False
    gradients_in_evaluation: bool = False
    train_mode: Callable[[Any], object] = nn.Module.train
    generate: Callable[[Any], Tensor] | None = None


# --- images --------------------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits: images of shape (1797, 1, 8, 8) in 0…1, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def images(*sizes: int, start: int = 0, shape: tuple[int, ...] = (1, 8, 8)) -> Callable[[], list[Batch]]:
    """Batches of digits and classes; in other shapes a batch takes what it needs and has the first one's class."""

    def batches() -> list[Batch]:
        all_images, classes = digits()
        taken, found = start, []
        for size in sizes:
            count = size * torch.Size(shape).numel() // 64
            end = taken + count
            found.append((all_images[taken:end].reshape(size, *shape), classes[taken : end : count // size]))
            taken = end
        return found

    return batches


TRAINING, HELD_OUT = (24, 1, 13), (20, 7)
"""Batch sizes. A batch of one is where shapes go wrong."""


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the classes; the output may be one of transformers'."""
    output: Any = model(batch[0])
    return F.cross_entropy(getattr(output, "logits", output).float(), batch[1])


def denoising(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error of a reconstruction from a noisy input; the noise moves the RNG."""
    restored: Tensor = model(batch[0] + 0.2 * torch.randn_like(batch[0]))
    return F.mse_loss(restored, batch[0])


def image_case(build: Callable[[], nn.Module], loss: Callable[[Any, Batch], Tensor] = classification) -> Case:
    """A case on digits."""
    return Case(build, images(*TRAINING), images(*HELD_OUT, start=900), loss)


def channels_last(model: nn.Module, batch: Batch) -> Tensor:
    """The classes, from images whose channels lie next to each other in memory, in mixed precision."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return classification(model, (batch[0].to(memory_format=torch.channels_last), batch[1]))


BELL_COTE, DAISY = 442, 985
"""ImageNet's classes of what the photographs show: a Chinese temple and a flower."""


def photographs(size: int) -> Tensor:
    """Scikit-learn's two photographs and their mirror images, shape (4, 3, size, size), in −1…1."""
    from sklearn.datasets import load_sample_images

    both = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2) / 127.5 - 1
    both = F.interpolate(both, size=(size, size), mode="bilinear", antialias=True)
    return torch.cat([both, both.flip(-1)])


@functools.cache
def photograph_batches(*sizes: int) -> list[Batch]:
    """Batches of the photographs and their classes."""
    classes = torch.tensor([BELL_COTE, DAISY, BELL_COTE, DAISY])
    return list(zip(photographs(96).split(sizes), classes.split(sizes), strict=True))


def head_only(model: Any) -> None:
    """Train the last layer on features that stay as they are: everything before it is in evaluation mode."""
    model.eval()
    model._fc.train()
    model._dropout.train()


# --- text ----------------------------------------------------------------------------------------------


@functools.cache
def lines() -> list[Tensor]:
    """The lines of this repository's licence that are not empty, as bytes."""
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_bytes()
    return [torch.tensor(list(line)) for line in text.splitlines() if line.strip()]


def text(start: int, rows: int, length: int) -> Tensor:
    """Bytes of the licence from `start` on, cut into rows of a length."""
    return torch.cat(lines())[start : start + rows * length].view(rows, length)


def texts(*shapes: tuple[int, int], start: int = 0) -> Callable[[], list[Batch]]:
    """Batches of text, each of a shape (B, T)."""

    def batches() -> list[Batch]:
        taken, found = start, []
        for rows, length in shapes:
            found.append((text(taken, rows, length),))
            taken += rows * length
        return found

    return batches


TRAINING_TEXT, HELD_OUT_TEXT = ((6, 20), (1, 33), (4, 9)), ((5, 16), (2, 25))


def text_case(build: Callable[[], nn.Module], loss: Callable[[Any, Batch], Tensor], **options: Any) -> Case:
    """A case on the licence."""
    return Case(build, texts(*TRAINING_TEXT), texts(*HELD_OUT_TEXT, start=500), loss, **options)


def next_byte(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each byte after the first."""
    output: Any = model(batch[0])
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


def masked_bytes(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of bytes that were masked out at random, with padding at the end."""
    bytes_BT = batch[0]
    masked = torch.rand(bytes_BT.shape) < 0.2
    masked[:, 0] = True
    attention = torch.ones_like(bytes_BT)
    attention[:, -2:] = 0
    output: Any = model(bytes_BT.masked_fill(masked, 0), attention_mask=attention)
    return F.cross_entropy(output.logits[masked], bytes_BT[masked])


def reversal(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the bytes in reverse order, by an encoder and a decoder of torch."""
    target = batch[0].flip(1)
    return F.cross_entropy(model(batch[0], target)[:, :-1].flatten(0, 1), target[:, 1:].flatten())


def translation(model: nn.Module, batch: Batch) -> Tensor:
    """The same by one of transformers, which makes the decoder's input itself."""
    output: Any = model(input_ids=batch[0], labels=batch[0].flip(1)[:, :7].contiguous())
    loss: Tensor = output.loss
    return loss


def sample_text(model: Any) -> Tensor:
    """A text drawn byte by byte, each forward after the first with one position and the cache of the others."""
    drawn: Tensor = model.generate(
        text(0, 2, 6), attention_mask=torch.ones(2, 6), max_new_tokens=5, do_sample=True, pad_token_id=0
    )
    return drawn


def tags(bytes_: Tensor) -> Tensor:
    """Lower case, upper case, space, or anything else: the class of each byte."""
    lower, upper = (bytes_ >= 97) & (bytes_ <= 122), (bytes_ >= 65) & (bytes_ <= 90)
    return torch.where(lower, 0, torch.where(upper, 1, torch.where(bytes_ == 32, 2, 3)))


def packed_lines(*counts: int, start: int = 0) -> Callable[[], list[Batch]]:
    """Batches of lines of the licence: packed sequences of different lengths, in the order of the text."""

    def batches() -> list[Batch]:
        taken, found = start, []
        for count in counts:
            found.append((pack_sequence(lines()[taken : taken + count], enforce_sorted=False),))
            taken += count
        return found

    return batches


def tagging(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the tags of each byte; the logits are packed, or padded with the batch first."""
    bytes_: PackedSequence = batch[0]
    logits: Tensor = model(bytes_)
    if logits.dim() == 3:
        padded, _ = torch.nn.utils.rnn.pad_packed_sequence(bytes_, batch_first=True)
        return F.cross_entropy(logits[padded > 0], tags(padded[padded > 0]))
    return F.cross_entropy(logits, tags(bytes_.data))


def tagger_case(build: Callable[[], nn.Module]) -> Case:
    """A case on the lines of the licence."""
    return Case(build, packed_lines(6, 1, 4), packed_lines(3, 2, start=11), tagging)


def pairs(*counts: int, start: int = 0) -> Callable[[], list[Batch]]:
    """Batches of two lines, padded with zeros: half of the second ones follow the first, half do not."""

    def batches() -> list[Batch]:
        taken, found = start, []
        for count in counts:
            chosen = range(taken, taken + count)
            second = [lines()[index + (1 if index % 2 else 2)] for index in chosen]
            follows = torch.tensor([float(index % 2) for index in chosen])
            first = pad_sequence([lines()[index] for index in chosen], batch_first=True)
            found.append((first, pad_sequence(second, batch_first=True), follows))
            taken += count
        return found

    return batches


def pair_case(build: Callable[[], nn.Module]) -> Case:
    """A case on pairs of lines."""
    return Case(build, pairs(6, 1, 3), pairs(4, 1, start=9), follow)


def follow(model: nn.Module, batch: Batch) -> Tensor:
    """Binary cross-entropy of whether the second text follows the first."""
    return F.binary_cross_entropy_with_logits(model(batch[0], batch[1]), batch[2])


# --- all of them ---------------------------------------------------------------------------------------


CASES = {
    "resnet": image_case(zoo.ResNet),
    "resnet in bfloat16": image_case(lambda: zoo.ResNet().to(memory_format=torch.channels_last), channels_last),
    "u-net": image_case(zoo.UNet, denoising),
    "signals": Case(
        zoo.signal_autoencoder,
        images(*TRAINING, shape=(1, 64)),
        images(*HELD_OUT, start=900, shape=(1, 64)),
        denoising,
    ),
    "clips": Case(
        zoo.clip_autoencoder,
        images(8, 1, 3, shape=(1, 5, 8, 8)),
        images(5, 2, start=900, shape=(1, 3, 8, 8)),
        denoising,
    ),
    "lstm": tagger_case(lambda: zoo.Tagger(nn.LSTM, 4)),
    "lstm with projections": tagger_case(lambda: zoo.Tagger(nn.LSTM, 4, proj_size=5)),
    "gru": tagger_case(lambda: zoo.Tagger(nn.GRU, 4)),
    "padded rnn": tagger_case(lambda: zoo.PaddedTagger(nn.RNN, 4, nonlinearity="relu", batch_first=True)),
    "cells": text_case(zoo.Cells, next_byte),
    "attention": pair_case(zoo.Attention),
    "seq2seq": text_case(zoo.Seq2Seq, reversal, gradients_in_evaluation=True),
    "bags": pair_case(zoo.Bags),
    "gpt2": text_case(known.gpt2, next_byte, generate=sample_text),
    "checkpointed gpt2": text_case(known.checkpointed_gpt2, next_byte, recomputes=True),
    "llama": text_case(known.llama, next_byte),
    "bert": text_case(known.bert, masked_bytes),
    "t5": text_case(known.t5, translation, idle=("shared",)),
    "vit": image_case(known.vit),
    "swin": image_case(known.swin),
    "efficientnet": Case(
        known.efficientnet,
        lambda: photograph_batches(3, 1),
        lambda: photograph_batches(1, 3),
        classification,
        windows=1,
        train_mode=head_only,
    ),
}
