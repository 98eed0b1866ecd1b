"""The random number generators of every process.

torch's are the only ones that training could draw from: orders of data have generators of their own, whose
positions are plain numbers.
"""

import torch

from finetune.distributed import Process
from finetune.pieces import Piece, PieceReader


def random_pieces(process: Process) -> list[Piece]:
    """The state of each generator as this process's row of a tensor `[processes, bytes]`."""
    states = {"random/cpu": torch.get_rng_state()}
    if process.device.type == "cuda":
        states["random/cuda"] = torch.cuda.get_rng_state(process.device)
    return [
        Piece(name, (process.world_size, len(state)), (process.rank, 0), state[None])
        for name, state in states.items()
    ]


def restore_random(reader: PieceReader, process: Process, seed: int) -> None:
    """Go on with the saved numbers; with another number of processes, with new ones from `seed`."""
    pieces = random_pieces(process)
    if any(reader.shapes.get(piece.name) != piece.shape for piece in pieces):
        torch.manual_seed(seed * process.world_size + process.rank)
        return
    reader.read(pieces)
    for piece in pieces:
        if piece.name == "random/cpu":
            torch.set_rng_state(piece.tensor[0])
        else:
            torch.cuda.set_rng_state(piece.tensor[0], process.device)
