"""The inner loop's forward and backward pass at Moshi's size, as layers call it and as an eager scan."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.gpu.clock import interleaved, peak_bytes
from benchmarks.gpu.results import Results
from moshi_ttt.dual_form import dual_form
from moshi_ttt.inner_loop import inner_loop, step_scale
from moshi_ttt.inner_network import InnerNorm
from moshi_ttt.inner_weights import InnerBound, InnerWeights
from moshi_ttt.mini_batches import Rules, Tokens

WIDTH, HIDDEN = 128, 512
FRAMES, LONG = 1250, 7500
GROUP = 16
# Batch rows, heads, mini-batch.
SIZES = ((1, 32, 16), (1, 8, 16), (16, 32, 16), (16, 8, 16), (1, 32, 64), (16, 32, 64))
LINEAR_SIZES = ((1, 32, 16), (16, 32, 16), (16, 32, 64))


class Problem:
    """Inputs of an inner loop: `nets` = batch rows x heads; of `layers` inner layers, 1 (TTT-Linear) or 2."""

    def __init__(
        self, nets: int, heads: int, frames: int, mini_batch: int, device: torch.device, layers: int = 2
    ):
        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(*shape, device=device)).requires_grad_()

        self.q = F.normalize(torch.randn(nets, frames, WIDTH, device=device), dim=-1).requires_grad_()
        self.k = F.normalize(torch.randn(nets, frames, WIDTH, device=device), dim=-1).requires_grad_()
        self.target = draw(nets, frames, WIDTH)
        self.lr = (8.0 / WIDTH * torch.rand(nets, frames, device=device)).requires_grad_()
        # Asked for: `auto` takes only what has been tried.
        self.kernel = "triton" if layers == 1 and device.type == "cuda" else "auto"
        if layers == 1:
            learned, biases = [draw(heads, WIDTH, WIDTH, scale=0.02)], [draw(heads, 1, WIDTH, scale=0.01)]
        else:
            learned = [draw(heads, WIDTH, HIDDEN), draw(heads, HIDDEN, WIDTH, scale=HIDDEN**-0.5)]
            biases = [draw(heads, 1, HIDDEN, scale=0.01), draw(heads, 1, WIDTH, scale=0.01)]
        self.learned = [*learned, *biases]
        rows = nets // heads
        self.state = InnerWeights(
            tuple(w.repeat(rows, 1, 1) for w in learned), tuple(b.repeat(rows, 1, 1) for b in biases)
        )
        self.norm = InnerNorm(
            torch.ones(nets, 1, WIDTH, device=device).requires_grad_(), draw(nets, 1, WIDTH, scale=0.01)
        )
        self.scale = step_scale(1.0 / torch.arange(1, mini_batch + 1, device=device))
        # As `TTTConfig.max_inner_change` has it by default.
        radii = (3.0 * WIDTH,) if layers == 1 else (3.0 * (WIDTH * HIDDEN) ** 0.5, 3.0 * WIDTH**0.5)
        self.bound = InnerBound(InnerWeights(tuple(learned), tuple(biases)), radii)
        self.weight = torch.randn(nets, frames, WIDTH, device=device)

    def ours(self) -> torch.Tensor:
        arguments = (self.q, self.k, self.target, self.lr, self.state, self.norm, self.scale, GROUP)
        return inner_loop(*arguments, self.bound, self.kernel)[0]

    def eager(self) -> torch.Tensor:
        tokens = Tokens(self.q, self.k, self.target, self.lr)
        return dual_form(tokens, self.state, Rules(self.norm, self.scale, self.bound), GROUP)[0]

    def gradients(self, forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = (self.q, self.k, self.target, self.lr, *self.learned, self.norm.weight, self.norm.bias)
        return torch.autograd.grad(forward(), leaves, self.weight, retain_graph=True)


def report(
    results: Results, rows: int, heads: int, mini_batch: int, device: torch.device, layers: int = 2
) -> None:
    problem = Problem(rows * heads, heads, FRAMES, mini_batch, device, layers)
    pairs = zip(problem.gradients(problem.ours), problem.gradients(problem.eager), strict=True)
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    assert max(errors) < 1e-2, errors  # a wrong result is not worth timing
    works = {
        "ours": lambda: problem.gradients(problem.ours),
        "eager": lambda: problem.gradients(problem.eager),
    }
    ms = {name: 1e3 * s for name, s in interleaved(works, device, 5 if rows == 1 else 3).items()}
    forward = {"ours": problem.ours, "eager": problem.eager}
    with torch.no_grad():
        forward_ms = {name: 1e3 * s for name, s in interleaved(forward, device, 5).items()}
    of_linear = "" if layers == 2 else " of TTT-Linear"
    results.add(
        f"inner loop{of_linear}, batch {rows}, {heads} heads, mini-batch {mini_batch}, {FRAMES} frames",
        ms["ours"],
        ms["eager"],
        "the eager scan (dual_form)",
        "ms",
        5.0,
        forward_ms={name: round(value, 3) for name, value in forward_ms.items()},
        largest_relative_difference=max(errors),
    )


def report_memory(results: Results, heads: int, device: torch.device) -> None:
    """Memory of one row by length."""
    peaks = {}
    for frames in (FRAMES, 2 * FRAMES, LONG):
        problem = Problem(heads, heads, frames, 16, device)
        peaks[frames] = peak_bytes(lambda p=problem: p.gradients(p.ours), device) / 1e9
    slope = (peaks[2 * FRAMES] - peaks[FRAMES]) / FRAMES
    results.add(
        f"inner loop, memory of {LONG} frames, batch 1, {heads} heads",
        peaks[LONG],
        peaks[FRAMES] + slope * (LONG - FRAMES),
        "a straight line through the memory of shorter ones",
        "GB",
        0.95,
        gb_by_frames={str(frames): round(peak, 3) for frames, peak in peaks.items()},
    )


def run(results: Results) -> None:
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    for rows, heads, mini_batch in SIZES:
        report(results, rows, heads, mini_batch, device)
    for rows, heads, mini_batch in LINEAR_SIZES:
        report(results, rows, heads, mini_batch, device, layers=1)
    for heads in (8, 32):
        report_memory(results, heads, device)
