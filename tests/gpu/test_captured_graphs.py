"""Steps captured as CUDA graphs are the eager steps, with rows that rest and rows that start anew."""

import pytest
import torch
from device_under_test import DEVICE, ON_GPU, graphs
from moshi.models.lm import LMGen
from test_masks import CONSTANT

from moshi_ttt.kernels.choice import forced

FRAMES = 43
SHORT = {"mini_batch_size": 4, "ttt_layer_context": 6, "non_ttt_layer_context": 9}
SETTINGS = {
    "linear": {"ssm_layer": "ttt_linear"},
    "mlp": {},
    "three layers": {"ttt_mlp_layers": 3},
    "bound that acts": {"max_inner_change": 0.05},
    "no bound": {"max_inner_change": None},
    "learned scale": {"learned_token_scale": True},
    "convex": {"gate": "convex"},
    "bfloat16": {"param_dtype": "bfloat16"},
    "wide heads": {"head_dim": 128, "num_heads": 2, "mini_batch_size": 16},
}
IN_KERNELS = {name: s for name, s in SETTINGS.items() if name not in ("linear", "three layers")}
# Row 0 never rests. Row 1 starts anew twice, once in the middle of a mini-batch. Row 2 rests, starts anew
# while its neighbours go on, and rests again.
RESETS = {9: [False, True, False], 18: [False, True, True]}
RESTING = {2: {*range(3), *range(11, 16), 20, 22, 30}}


def user_codes(rows: int, frames: int = FRAMES) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 8, frames)).to(DEVICE)


def executing(rows: int, frame: int) -> torch.Tensor:
    return torch.tensor([frame not in RESTING.get(row, ()) for row in range(rows)])


class Stream:
    """A dialogue in codes that takes the likeliest tokens, and what came out."""

    def __init__(self, model, rows: int, read):
        self.read = read
        self.text_logits: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []
        self.generator = LMGen(
            model,
            use_sampling=False,
            support_out_of_sync=True,
            on_text_logits_hook=lambda logits: self.text_logits.append(logits[:, 0, 0].float().clone()),
        )
        self.rows = rows

    def step(self, codes: torch.Tensor) -> None:
        self.tokens.append(self.generator.step(codes).clone())

    @torch.no_grad()
    def run(self, user: torch.Tensor, captured: bool, masked: bool) -> "Stream":
        with graphs(captured), self.generator.streaming(self.rows):
            for frame, codes in enumerate(user.split(1, dim=2)):
                if masked and frame in RESETS:
                    self.generator.reset_streaming(torch.tensor(RESETS[frame], device=DEVICE))
                if masked:
                    self.generator.set_exec_mask(executing(self.rows, frame).to(DEVICE))
                self.step(codes)
            state = self.generator._streaming_state
            assert (state.graphed_main._graph is not None) == (captured and ON_GPU)
            self.state = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.read(self.generator.lm_model)


@pytest.fixture
def stream(streaming_tensors):
    return lambda model, rows: Stream(model, rows, streaming_tensors)


def assert_same(a: Stream, b: Stream, tolerance: float) -> None:
    assert torch.equal(torch.stack(a.tokens), torch.stack(b.tokens))
    assert (torch.stack(a.text_logits) - torch.stack(b.text_logits)).abs().max() <= tolerance
    assert a.state.keys() == b.state.keys()
    for name, tensor in a.state.items():
        other = b.state[name]
        if tensor.is_floating_point():
            scale = max(1.0, other.float().abs().max().item())
            assert (tensor.float() - other.float()).abs().max() <= tolerance * scale, name
        else:
            assert torch.equal(tensor, other), name


@pytest.mark.parametrize("settings", IN_KERNELS.values(), ids=IN_KERNELS.keys())
@torch.no_grad()
def test_a_stream_in_triton_kernels_is_that_in_torchs_operations(build_there, random_codes, settings):
    model, codes = build_there(**(SHORT | settings)), random_codes(3, FRAMES).to(DEVICE)
    logits = {}
    for kernel in ("eager", "triton"):
        with forced(kernel), model.streaming(3):
            steps = []
            for frame, column in enumerate(codes.split(1, dim=2)):
                if frame in RESETS:
                    model.reset_streaming(torch.tensor(RESETS[frame], device=DEVICE))
                model.set_exec_mask(executing(3, frame).to(DEVICE))
                steps.append(model.forward_text(column)[1].float())
        logits[kernel] = torch.cat(steps, dim=2)
    difference = (logits["triton"] - logits["eager"]).norm() / logits["eager"].norm()
    assert difference <= (0.03 if settings.get("param_dtype") == "bfloat16" else 1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["together", "masks and resets"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_captured_stream_is_the_eager_one(build_there, stream, settings, masked):
    model = build_there(**(SHORT | settings))
    user = user_codes(3)
    captured = stream(model, 3).run(user, captured=True, masked=masked)
    eager = stream(model, 3).run(user, captured=False, masked=masked)
    assert_same(captured, eager, 0.02 if settings.get("param_dtype") == "bfloat16" else 1e-5)
    said = torch.stack(captured.text_logits)
    assert (said[-1] - said[-5]).abs().max() > 0.01  # they do not all say the same


def test_rows_under_capture_are_streams_of_their_own(build_there, stream):
    model = build_there(**SHORT)
    user = user_codes(3)
    together = stream(model, 3).run(user, captured=True, masked=True)
    for row in range(3):
        starts = [0, *(frame for frame, rows in RESETS.items() if rows[row]), FRAMES]
        for first, end in zip(starts[:-1], starts[1:], strict=True):
            awake = [frame for frame in range(first, end) if executing(3, frame)[row]]
            alone = stream(model, 1).run(user[row : row + 1, :, awake], captured=True, masked=False)
            for frame, tokens, logits in zip(awake, alone.tokens, alone.text_logits, strict=True):
                assert (together.text_logits[frame][row] - logits[0]).abs().max() <= 1e-4
                assert torch.equal(together.tokens[frame][row], tokens[0])


@torch.no_grad()
def test_under_capture_a_resting_row_keeps_its_state_and_a_reset_one_has_a_new_streams(build_there, stream):
    model = build_there(**SHORT)
    user, s = user_codes(3, 24), stream(model, 3)

    def row(tensors, index):
        rows = {}
        for name, tensor in tensors.items():
            if any(part in name for part in CONSTANT):
                continue
            joined = tensor.transpose(0, 1) if name.endswith("kv_cache.cache") else tensor
            if ".inner." in name or ".pending." in name:
                joined = tensor.unflatten(0, (3, -1))
            rows[name] = joined[index].clone()
        return rows

    def different(a, b):
        return {name for name in a if not torch.equal(a[name], b[name])}

    with s.generator.streaming(3):
        new = row(s.tensors(), 1)
        for frame in range(10):
            s.step(user[:, :, frame : frame + 1])
        before = row(s.tensors(), 1)
        s.generator.set_exec_mask(torch.tensor([True, False, True], device=DEVICE))
        for frame in range(10, 20):
            s.step(user[:, :, frame : frame + 1])
        after = row(s.tensors(), 1)
        # What was not counted may lie in the slot of the next token and the next key, which overwrite it.
        scratch = {n for n in before if ".pending." in n or n.endswith(("cache.cache", "exec_mask"))}
        assert different(before, after) <= scratch
        neighbour = row(s.tensors(), 0)
        s.generator.reset_streaming(torch.tensor([False, True, False], device=DEVICE))
        reset = row(s.tensors(), 1)
        assert different(neighbour, row(s.tensors(), 0)) == set()
        ttt = {name for name in new if ".seq_modeling_block." in name}
        assert different(new, reset) & ttt == set()
        assert different(before, new) & ttt


@torch.no_grad()
def test_the_state_stays_where_it_is_and_memory_is_equal_over_1000_steps(build_there, stream):
    model = build_there(**SHORT)
    user, s = user_codes(4, 50), stream(model, 4)

    def allocated() -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    s.step = lambda codes: s.generator.step(codes)  # keeps nothing
    s.generator.on_text_logits_hook = None
    mask = torch.ones(4, dtype=torch.bool, device=DEVICE)
    with s.generator.streaming(4):
        for frame in range(1000):
            mask[3] = frame % 3 > 0
            s.generator.set_exec_mask(mask)
            s.step(user[:, :, frame % 50, None])
            if frame == 20:
                places = {name: tensor.data_ptr() for name, tensor in s.tensors().items()}
                held = allocated() if ON_GPU else 0
        assert {name: tensor.data_ptr() for name, tensor in s.tensors().items()} == places
        assert len(places) > 40
        if ON_GPU:
            assert allocated() == held
