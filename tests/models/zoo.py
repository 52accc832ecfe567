"""Networks as users write them, small: residual, U-shaped, 1-D, 3-D, recurrent and attention ones, untrained.

Letters in names: N images, C channels, H×W positions, B sequences, T steps of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

# --- convolutions --------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation, and the input added in place before the last activation."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Feature maps of `out` channels."""
        shortcut = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        x_NCHW = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x_NCHW)))))
        x_NCHW += shortcut
        activated: Tensor = self.relu(x_NCHW)
        return activated


class ResNet(nn.Module):
    """Images of one channel to ten classes, as torchvision writes its ResNets."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(ResidualBlock(width, width), ResidualBlock(width, width))
        self.layer2 = nn.Sequential(ResidualBlock(width, 2 * width, stride=2), ResidualBlock(2 * width, 2 * width))
        self.layer3 = nn.Sequential(ResidualBlock(2 * width, 4 * width, stride=2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits of shape (N, 10)."""
        x_NCHW = self.relu(self.bn1(self.conv1(x_NCHW)))
        x_NCHW = self.layer3(self.layer2(self.layer1(x_NCHW)))
        logits: Tensor = self.fc(self.avgpool(x_NCHW).flatten(1))
        return logits


def double_conv(channels: int, out: int) -> nn.Sequential:
    """What a U-Net repeats: convolution, normalisation, activation, twice."""
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
        nn.Conv2d(out, out, 3, padding=1),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Images of one channel to maps of the same size, over two levels; transposed convolutions, one of them grouped."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.down1 = double_conv(1, width)
        self.down2 = double_conv(width, 2 * width)
        self.bottom = double_conv(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout2d(0.2)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = double_conv(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, groups=2)
        self.merge1 = double_conv(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps of shape (N, 1, H, W)."""
        fine = self.down1(x_NCHW)
        coarse = self.down2(self.pool(fine))
        deepest = self.dropout(self.bottom(self.pool(coarse)))
        x_NCHW = self.merge2(torch.cat([self.up2(deepest), coarse], dim=1))
        x_NCHW = self.merge1(torch.cat([self.up1(x_NCHW), fine], dim=1))
        maps: Tensor = self.head(x_NCHW)
        return maps


def signal_autoencoder() -> nn.Sequential:
    """Signals of 1×64 to themselves: strided, dilated and depthwise 1-D convolutions, and transposed ones back."""
    return nn.Sequential(
        nn.Conv1d(1, 8, 5, stride=2, padding=2),
        nn.GELU(),
        nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=8),
        nn.Conv1d(8, 12, 1),
        nn.BatchNorm1d(12),
        nn.ReLU(inplace=True),
        nn.Conv1d(12, 12, 4, stride=2, padding=1, padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.ConvTranspose1d(12, 9, 4, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.ConvTranspose1d(9, 1, 3, stride=2, padding=1, output_padding=1),
    )


def clip_autoencoder() -> nn.Sequential:
    """Clips of 1×frames×8×8 to themselves: 3-D convolutions and transposed ones."""
    return nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1),
        nn.BatchNorm3d(6),
        nn.ReLU(inplace=True),
        nn.Conv3d(6, 10, (1, 2, 2), stride=(1, 2, 2)),
        nn.ReLU(inplace=True),
        nn.Dropout3d(0.2),
        nn.ConvTranspose3d(10, 6, (1, 2, 2), stride=(1, 2, 2)),
        nn.ReLU(inplace=True),
        nn.ConvTranspose3d(6, 1, 3, padding=1),
    )


# --- recurrent networks --------------------------------------------------------------------------------


class Tagger(nn.Module):
    """A tag for each byte of packed sequences: a stacked, bidirectional recurrent network with dropout.

    Args:
        kind: nn.LSTM, nn.GRU or nn.RNN.
        tags: number of classes.
        options: of the recurrent network, such as proj_size.
    """

    def __init__(self, kind: type[nn.RNNBase], tags: int, **options: int | str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 10)
        self.encoder = kind(10, 12, num_layers=2, bidirectional=True, dropout=0.2, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(2 * int(options.get("proj_size", 12)), tags)

    def forward(self, bytes_: PackedSequence) -> Tensor:
        """Logits of shape (steps of all sequences, tags), in the order of the packed sequence."""
        steps, _ = self.encoder(bytes_._replace(data=self.embedding(bytes_.data)))
        logits: Tensor = self.head(steps.data)
        return logits


class PaddedTagger(Tagger):
    """The same on padded batches, the batch first, as a user who has never heard of packing writes it."""

    def forward(self, bytes_: PackedSequence) -> Tensor:
        """Logits of shape (B, T, tags), with padding."""
        padded_BT, _ = pad_packed_sequence(bytes_, batch_first=True)
        steps_BTD, _ = self.encoder(self.embedding(padded_BT))
        logits: Tensor = self.head(steps_BTD)
        return logits


class Cells(nn.Module):
    """The next byte, by a loop over steps through an LSTM cell, a GRU cell and an RNN cell."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 10)
        self.lstm = nn.LSTMCell(10, 14)
        self.gru = nn.GRUCell(14, 11)
        self.rnn = nn.RNNCell(11, 9)
        self.head = nn.Linear(9, 256)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        """Logits of shape (B, T, 256)."""
        memory: tuple[Tensor, Tensor] | None = None
        gated: Tensor | None = None
        simple: Tensor | None = None
        logits = []
        for step_BD in self.embedding(bytes_BT).unbind(1):
            memory = self.lstm(step_BD, memory)
            gated = self.gru(memory[0], gated)
            simple = self.rnn(gated, simple)
            logits.append(self.head(simple))
        return torch.stack(logits, dim=1)


# --- attention and sums --------------------------------------------------------------------------------


class Attention(nn.Module):
    """Does a second text follow a first? Self-attention over each, cross-attention of other widths between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.positions = nn.Embedding(80, 16)
        self.layer = nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 30), nn.GELU(), nn.Dropout(0.1), nn.Linear(30, 12))
        self.cross = nn.MultiheadAttention(16, 2, kdim=12, vdim=12, bias=False)
        self.head = nn.Linear(16, 1)

    def encode(self, bytes_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Texts of different lengths, padded with zero bytes: their steps, and where the padding is."""
        padding_BT = bytes_BT == 0
        x_BTD = self.embedding(bytes_BT) + self.positions(torch.arange(bytes_BT.shape[1]))
        mixed, _ = self.layer(x_BTD, x_BTD, x_BTD, key_padding_mask=padding_BT, need_weights=False)
        return x_BTD + mixed, padding_BT

    def forward(self, first_BT: Tensor, second_BT: Tensor) -> Tensor:
        """Logits of shape (B,)."""
        first, _ = self.encode(first_BT)
        second, padding_BT = self.encode(second_BT)
        keys = self.mlp(second).transpose(0, 1)
        mixed, weights = self.cross(first.transpose(0, 1), keys, keys, key_padding_mask=padding_BT)
        assert weights.shape == (len(first), first.shape[1], second.shape[1])
        logits: Tensor = self.head(mixed.mean(0)).squeeze(-1)
        return logits


class Seq2Seq(nn.Module):
    """Bytes to bytes through `nn.Transformer`, an encoder and a decoder of one layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, dim_feedforward=20, batch_first=True)
        self.head = nn.Linear(16, 256)

    def forward(self, source_BT: Tensor, target_BT: Tensor) -> Tensor:
        """Logits of shape (B, T, 256)."""
        later = nn.Transformer.generate_square_subsequent_mask(target_BT.shape[1])
        steps = self.transformer(self.embedding(source_BT), self.embedding(target_BT), tgt_mask=later)
        logits: Tensor = self.head(steps)
        return logits


class Bags(nn.Module):
    """Does a second text follow a first? A bag of bytes for each, and a bilinear score."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(256, 11, mode="mean", padding_idx=0)
        self.pair = nn.Bilinear(11, 11, 7)
        self.head = nn.Linear(7, 1)

    def forward(self, first_BT: Tensor, second_BT: Tensor) -> Tensor:
        """Logits of shape (B,)."""
        logits: Tensor = self.head(F.elu(self.pair(self.bag(first_BT), self.bag(second_BT)), inplace=True)).squeeze(-1)
        return logits
