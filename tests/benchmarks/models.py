"""The networks that are trained, and the batches they are trained on: plain torch, small enough for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Inputs and class labels."""

CLASSES = 10
_BATCHES = 8
"""Different batches, taken in turn."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and the shape of its batches; `block` is how many steps make one sample (see `timing`)."""

    name: str
    text: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    block: int

    def batches(self) -> list[Batch]:
        """The same batches at each call."""
        generator = torch.Generator().manual_seed(1)
        size = self.input_shape[0]
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


WORKLOADS = (
    Workload("MLP", "784→512→512→512→10, batch 128", mlp, (128, 784), block=32),
    Workload("ResNet", "ResNet-18 of width 32, batch 32 of 3×32×32", resnet, (32, 3, 32, 32), block=8),
)
