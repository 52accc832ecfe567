"""From a layer's output to the rows that count: placement, masks, last steps, and a bounded or random choice.

Letters in names: B batch, T steps of a sequence, D features. `keep` is a boolean tensor of the shape of the rows
without their last dimension: False where a row does not count. Nothing here waits for a device.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from delve_ray.errors import Unrecordable
from delve_ray.layers import LayerAdapter, RowOptions, has_padding, search_tensor


@dataclass(frozen=True, slots=True)
class Reader:
    """How one layer is read; layers of one kind share it, so that compiled code can serve them all."""

    adapter: LayerAdapter
    options: RowOptions

    def read(self, module: nn.Module, output: Any) -> tuple[Tensor, bool] | None:
        """The rows (…, D) of an output and whether a mask can concern them; None where another rank has them.

        Also traced by torch.compile, so it only reshapes. Raises Unrecordable.
        """
        if type(output) is Tensor:
            output = output.detach()
            if output.is_quantized:
                output = output.dequantize()
        else:
            first = search_tensor(output)
            if hasattr(first, "placements"):
                if not self._is_ours(module, first):
                    return None
                output = tree_map_only(type(first), lambda tensor: tensor.to_local(), output)
        rows = self.adapter.rows(module, output, self.options)
        if not isinstance(rows, Tensor):
            raise TypeError(f"the adapter's rows are a {type(rows).__name__}, not a tensor")
        if rows.requires_grad:
            rows = rows.detach()
        return rows, has_padding(output)

    def _is_ours(self, module: nn.Module, tensor: Any) -> bool:
        """Whether this rank records its share of a DTensor, or another one that has the same.

        Never communicates. Raises Unrecordable where the share holds no whole rows.
        """
        whole = self.adapter.row_dimensions(module, tensor.dim(), self.options)
        ours = True
        for dimension, placement in enumerate(tensor.placements):
            if placement.is_partial() or (placement.is_shard() and placement.dim % tensor.dim() in whole):
                what = "a sum that is not taken yet" if placement.is_partial() else "its rows are spread over ranks"
                raise Unrecordable(
                    f"its output is a DTensor of placements {tensor.placements}: {what}; make the tracker after the "
                    f"model is parallelized, track a module whose output is whole, or give this one another layout"
                )
            if placement.is_replicate() and tensor.device_mesh.get_local_rank(dimension) != 0:
                ours = False
        return ours


@dataclass(frozen=True, slots=True)
class Mask:
    """Which steps of which sequences count: `valid` is boolean, B×T (or with further dimensions, or B alone).

    `batch_first` says how layers are laid out whose own layout is unknown, such as a Linear.
    """

    valid: Tensor
    batch_first: bool = True
    copies: dict[object, Mask] = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device) -> Mask:
        """The same on another device; copied once for all layers, on each stream that they run on."""
        if self.valid.device == device:
            return self
        place: object = torch.cuda.current_stream(device) if device.type == "cuda" else device
        if place not in self.copies:
            # A copy to the host that nobody waits for would be read before it is there.
            valid = self.valid.to(device, non_blocking=device.type != "cpu")
            self.copies[place] = Mask(valid, self.batch_first)
        return self.copies[place]

    def keep(self, shape: torch.Size, *, steps_first: bool = False) -> Tensor | None:
        """`keep` for rows whose shape without features is `shape`; None where the mask does not fit them.

        It fits rows of its own shape, with or without further dimensions behind; rows of its flattened shape
        (that of T×B with `steps_first`); and rows that stand for whole sequences, which count where any of
        their steps does.
        """
        valid = self.valid
        if valid.dim() > 1 and valid.shape[1] in shape[2:]:
            return None  # such as B×heads×T: which of the dimensions are the steps?
        if shape[: valid.dim()] == valid.shape:
            return valid.reshape(*valid.shape, *[1] * (len(shape) - valid.dim())).expand(shape)
        if len(shape) == 1 and shape[0] == valid.numel():
            return (valid.transpose(0, 1) if steps_first and valid.dim() > 1 else valid).flatten()
        if len(shape) == 1 and shape[0] == valid.shape[0]:
            return valid.flatten(1).any(1)
        return None


def last_steps(rows_BTD: Tensor, keep_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The last step of each sequence that counts, (B, D); sequences without any do not count."""
    if keep_BT is None:
        return rows_BTD[:, -1], None
    steps = keep_BT.shape[1]
    last_B = steps - 1 - keep_BT.flip(1).to(torch.uint8).argmax(1)
    index = last_B.view(-1, 1, 1).expand(-1, 1, rows_BTD.shape[-1])
    return rows_BTD.gather(1, index).squeeze(1), keep_BT.any(1)


def first_rows(rows: Tensor, keep: Tensor | None, count: int) -> tuple[Tensor, Tensor | None]:
    """The first `count` rows, in the order of the leading dimensions."""
    per_item = max(rows[0].numel() // rows.shape[-1], 1)
    items = -(-count // per_item)
    rows = rows[:items].reshape(-1, rows.shape[-1])[:count]
    return rows, None if keep is None else keep[:items].reshape(-1)[:count]


class Sampler:
    """Chooses a fraction of an output's rows, each with the same probability, anew for every forward.

    Of feature maps the positions are chosen, the same in all samples of a batch, so that a choice costs one
    gather. Without replacement; a fraction of n rows is ⌊fraction·n⌋ rows or one more, on average exactly the
    fraction, so sums over chosen rows are unbiased. Draws come from generators of its own.
    """

    def __init__(self, fraction: float, seed: int) -> None:
        self.fraction = fraction
        self.seed = seed
        self._random = random.Random(seed)
        self._generators: dict[torch.device, torch.Generator] = {}

    def choose(self, rows: Tensor, keep: Tensor | None, *, feature_map: bool) -> tuple[Tensor, Tensor | None]:
        """The chosen rows, (B, m, D) of a feature map, else (m, D), and their `keep`."""
        if feature_map and rows.dim() > 2:
            rows = rows.flatten(1, -2)
            index = self._index(rows.shape[1], rows.device)
            if rows.stride(-1) == 1:
                chosen = rows.index_select(1, index)
            else:  # channels first in memory: gathered as they lie, or the whole map would be turned first
                chosen = rows.movedim(-1, 1).index_select(2, index).movedim(1, -1)
            return chosen, None if keep is None else keep.flatten(1).index_select(1, index)
        rows = rows.reshape(-1, rows.shape[-1])
        index = self._index(rows.shape[0], rows.device)
        return rows.index_select(0, index), None if keep is None else keep.reshape(-1).index_select(0, index)

    def _index(self, size: int, device: torch.device) -> Tensor:
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
            generator.manual_seed(self.seed)
        exact = self.fraction * size
        count = int(exact) + (self._random.random() < exact - int(exact))
        return torch.randperm(size, generator=generator, device=device)[:count].sort().values
