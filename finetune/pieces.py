"""Tensors that are spread over processes, in files that any number of processes can read.

Each process writes the boxes that it holds of each tensor, with their place in the whole, as safetensors. A
process that reads looks for what its own boxes share with those in the files, whoever wrote them. (Torch's
distributed checkpoints do the same, but keep their table of contents as a pickle, which runs what it holds.)
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Replicate, Shard

from moshi_ttt.tensor_file import write_tensors


@dataclass(frozen=True)
class Piece:
    """A box of a tensor.

    Args:
        name: of the tensor.
        shape: of the whole tensor.
        offset: where the box begins in it.
        tensor: the box; the live one, which reading fills.
        is_first: whether of all processes that hold this box, this is the one that writes it.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor
    is_first: bool = True

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.name}@{','.join(map(str, self.offset))}"


def piece_of(name: str, tensor: torch.Tensor, is_main: bool) -> Piece:
    """This process's part of a tensor: its shard, or all of one that every process has.

    Args:
        is_main: of the processes that have all of it, the main one writes it.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Piece(name, shape, (0,) * len(shape), tensor, is_main)
    mesh, placements = tensor.device_mesh, tensor.placements
    offset, is_first = [0] * len(shape), True
    for axis, placement in enumerate(placements):
        rank = mesh.get_local_rank(axis)
        if isinstance(placement, Shard):
            # As torch cuts: all parts of one size, but the last that is not empty, which has the rest.
            size = -(-shape[placement.dim] // mesh.size(axis))
            offset[placement.dim] = min(rank * size, shape[placement.dim])
        else:
            assert isinstance(placement, Replicate)
            is_first = is_first and rank == 0
    assert sum(isinstance(placement, Shard) for placement in placements) <= 1
    return Piece(name, shape, tuple(offset), tensor.to_local(), is_first)


def staged(pieces: Iterable[Piece]) -> list[Piece]:
    """Copies on the CPU of the pieces that this process writes."""
    return [
        Piece(piece.name, piece.shape, piece.offset, piece.tensor.detach().to("cpu", copy=True))
        for piece in pieces
        if piece.is_first and piece.tensor.numel()
    ]


def write_pieces(path: Path, pieces: Sequence[Piece]) -> None:
    """Write pieces on the CPU as one safetensors file.

    Raises:
        OSError: the file cannot be written whole.
    """
    shapes = {piece.name: piece.shape for piece in pieces}
    tensors = {piece.key: piece.tensor for piece in pieces}
    assert len(tensors) == len(pieces), "a piece was given twice"
    write_tensors(path, tensors, {"shapes": json.dumps(shapes)})


class PieceReader:
    """Reads pieces from the files of all processes that wrote them.

    Args:
        paths: the files, which have been verified.
    """

    def __init__(self, paths: Iterable[Path]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._boxes: dict[str, list[tuple[tuple[int, ...], str, Any]]] = {}
        for path in paths:
            file = safe_open(path, "pt")
            shapes = json.loads(file.metadata()["shapes"])
            self.shapes |= {name: tuple(shape) for name, shape in shapes.items()}
            for key in file.keys():  # noqa: SIM118 (a file is no dict)
                name, _, offset = key.rpartition("@")
                place = tuple(map(int, offset.split(","))) if offset else ()
                self._boxes.setdefault(name, []).append((place, key, file))

    @torch.no_grad()
    def read(self, pieces: Sequence[Piece]) -> None:
        """Fill the tensors of pieces.

        Raises:
            ValueError: the files hold no such tensor, one of another shape, or not all of it.
        """
        for piece in pieces:
            if piece.name not in self.shapes:
                raise ValueError(
                    f"the resume checkpoint holds no {piece.name}; resume with the settings it was saved with"
                )
            if self.shapes[piece.name] != piece.shape:
                raise ValueError(
                    f"{piece.name} of the resume checkpoint is {list(self.shapes[piece.name])}, that of this "
                    f"run {list(piece.shape)}; resume with the settings it was saved with"
                )
            filled = sum(self._fill(piece, *box) for box in self._boxes[piece.name])
            if filled != piece.tensor.numel():
                raise ValueError(
                    f"the resume checkpoint holds {filled} of the {piece.tensor.numel()} numbers that this "
                    f"process needs of {piece.name}; use another checkpoint"
                )

    def _fill(self, piece: Piece, offset: tuple[int, ...], key: str, file: Any) -> int:
        """Copy what a piece shares with a box of a file; returns how many numbers that are."""
        if not piece.shape:
            piece.tensor.copy_(file.get_tensor(key))
            return 1
        box = file.get_slice(key)
        source, target = [], []
        for mine, size, its, its_size in zip(
            piece.offset, piece.tensor.shape, offset, box.get_shape(), strict=True
        ):
            start, end = max(mine, its), min(mine + size, its + its_size)
            if start >= end:
                return 0
            source.append(slice(start - its, end - its))
            target.append(slice(start - mine, end - mine))
        shared = box[tuple(source)]
        piece.tensor[tuple(target)].copy_(shared)
        return shared.numel()
