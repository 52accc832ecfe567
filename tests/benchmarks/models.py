"""The networks that are trained, and the batches they are trained on: plain torch, small enough for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Inputs and class labels."""

CLASSES = 10
_BATCHES = 8
"""Different batches, taken in turn."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and the shape of its batches; `block` is how many steps make one sample (see `timing`).

    With `tokens` the input is B×T×D, and the model has an answer for each of the B·T tokens.
    """

    name: str
    text: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    block: int
    tokens: bool = False

    def batches(self) -> list[Batch]:
        """The same batches at each call."""
        generator = torch.Generator().manual_seed(1)
        size = self.input_shape[0] * (self.input_shape[1] if self.tokens else 1)
        return [
            (
                torch.randn(self.input_shape, generator=generator),
                torch.randint(0, CLASSES, (size,), generator=generator),
            )
            for _ in range(_BATCHES)
        ]


def mlp() -> nn.Module:
    """784 → 512 → 512 → 512 → 10 with ReLU."""
    return nn.Sequential(
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, CLASSES),
    )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, and a 1×1 convolution on the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.conv1(x_NCHW)))
        return torch.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x_NCHW))


def resnet(width: int = 32) -> nn.Module:
    """ResNet-18 for 32×32 inputs: a 3×3 stem, four stages of two blocks, `width` to 8·`width` channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage in range(4):
        for block in range(2):
            layers.append(ResidualBlock(channels, width << stage, 2 if stage and not block else 1))
            channels = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class FlatLSTM(nn.LSTM):
    """An LSTM whose output sequence B×T×D comes as its B·T rows.

    delve would make one row of B×T×D, T·D wide, or keep the last step; of N×D it takes every row, and so do we.
    """

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # type: ignore[override]
        steps_BTD, state = super().forward(x_BTD)
        return steps_BTD.flatten(0, 1), state


class StackedLSTM(nn.Module):
    """Two LSTMs and a Linear on every step: B×T×D to logits of B·T rows."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.lower = FlatLSTM(inputs, width, batch_first=True)
        self.upper = FlatLSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x_BTD: Tensor) -> Tensor:
        lower_ND, _ = self.lower(x_BTD)
        upper_ND, _ = self.upper(lower_ND.unflatten(0, x_BTD.shape[:2]))
        logits: Tensor = self.head(upper_ND)
        return logits


class TransformerBlock(nn.Module):
    """Causal self-attention and a two-layer network, each on normalised tokens and beside a shortcut.

    Tokens are N×D, N = B·T, outside of the attention itself: of a Linear's B×T×D delve keeps the last token.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_ND: Tensor, batch: int) -> Tensor:
        qkv = self.qkv(self.norm1(x_ND)).view(batch, -1, 3, self.heads, x_ND.shape[1] // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_ND = x_ND + self.proj(mixed.transpose(1, 2).reshape(x_ND.shape))
        return x_ND + self.down(F.gelu(self.up(self.norm2(x_ND))))


class Transformer(nn.Module):
    """A small GPT over given vectors: a Linear stem, learned positions, causal blocks, a Linear on every token."""

    def __init__(self, inputs: int, steps: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.positions = nn.Parameter(0.02 * torch.randn(steps, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch = x_BTD.shape[0]
        x_ND = self.stem(x_BTD.flatten(0, 1)) + self.positions.repeat(batch, 1)
        for block in self.blocks:
            x_ND = block(x_ND, batch)
        logits: Tensor = self.head(self.norm(x_ND))
        return logits


WORKLOADS = (
    Workload("MLP", "784→512→512→512→10, batch 128", mlp, (128, 784), block=32),
    Workload("ResNet", "ResNet-18 of width 32, batch 32 of 3×32×32", resnet, (32, 3, 32, 32), block=8),
    Workload(
        "LSTM",
        "two LSTMs of width 256, batch 32 of 32 steps, every step counts",
        lambda: StackedLSTM(64, 256),
        (32, 32, 64),
        block=8,
        tokens=True,
    ),
    Workload(
        "transformer",
        "two causal blocks of width 256, batch 16 of 64 tokens, every token counts",
        lambda: Transformer(64, 64, 256, 4, 2),
        (16, 64, 64),
        block=8,
        tokens=True,
    ),
)
