"""Rows of a batch out of step: each a stream of codes of its own, with its own state and noise."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from moshi.models.lm import LMGen, LMModel

from inference.noise import draw, uniform
from moshi_ttt.finite_state import restart_rows
from moshi_ttt.streaming import allow_chunks


@dataclass
class Sampling:
    """How tokens are drawn. Defaults are Moshi's. Field names are those of the configuration."""

    use_sampling: bool = True
    """False takes the likeliest token."""

    temp: float = 0.8
    """Temperature of audio tokens."""

    temp_text: float = 0.7
    """Temperature of text tokens."""

    top_k: int = 250
    """Audio tokens are drawn among the k likeliest; 0 means all."""

    top_k_text: int = 25
    """Text tokens likewise."""

    seed: int = 0
    """Same seed, settings and input: same answer, whatever else is on the machine."""


class StepWatch(Protocol):
    """Something that looks on while a model streams, such as `TTTDiagnostics` and `FiniteStateCheck`."""

    def step(self) -> AbstractContextManager[None]:
        """Context for each step of the model."""
        ...

    def finish(self) -> None:
        """Called after the last step, or before the state is saved, while the streaming state lives."""
        ...


class RowLMGen(LMGen):
    """LMGen whose rows are out of step and draw their tokens with noise of their own.

    Args:
        model (LMModel): in evaluation mode.
        sampling (Sampling): how tokens are drawn; its seed is not read.
    Attributes:
        seeds (torch.Tensor): of each row's noise, `[B]`; made when streaming starts.
    """

    seeds: torch.Tensor

    def __init__(self, model: LMModel, sampling: Sampling):
        # LMGen's own choice is the likeliest text token; the hook leaves it only the one that is drawn.
        super().__init__(
            model,
            use_sampling=False,
            support_out_of_sync=True,
            on_text_logits_hook=self._leave_drawn,
        )
        self._audio = (sampling.temp if sampling.use_sampling else 0.0, sampling.top_k)
        self._text = (sampling.temp_text if sampling.use_sampling else 0.0, sampling.top_k_text)

    def _init_streaming_state(self, batch_size: int):
        state = super()._init_streaming_state(batch_size)
        self.seeds = torch.zeros(batch_size, dtype=torch.long, device=state.device)
        # Kept in place: a captured depformer step reads it.
        self._noise = torch.zeros(
            batch_size, 1 + self.lm_model.dep_q, dtype=torch.float64, device=state.device
        )
        return state

    def step(
        self, input_tokens: torch.Tensor, depformer_replace_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One step of every row that executes: tokens `[B, 1 + dep_q, 1]`, as `LMGen.step`."""
        state = self._streaming_state
        assert state is not None
        self._noise.copy_(uniform(self.seeds, state.offsets, self._noise.shape[1]))
        tokens = super().step(input_tokens, depformer_replace_tokens)
        assert tokens is not None
        return tokens

    def _leave_drawn(self, text_logits: torch.Tensor) -> None:
        logits = text_logits[:, 0, 0]  # [B, card], a view
        drawn = draw(logits, self._noise[:, 0], *self._text)
        logits.fill_(-torch.inf).scatter_(1, drawn[:, None], 0.0)

    def depformer_step(self, text_token: torch.Tensor, transformer_out: torch.Tensor) -> torch.Tensor:
        """Moshi's codebooks of a frame one after the other, `[B, dep_q]`."""
        model, token, drawn = self.lm_model, text_token, []
        assert model.depformer is not None
        with model.depformer.streaming(text_token.shape[0]):
            for codebook in range(model.dep_q):
                logits = model.forward_depformer(codebook, token[:, None, None], transformer_out)
                token = draw(logits[:, 0, 0], self._noise[:, 1 + codebook], *self._audio)
                drawn.append(token)
        return torch.stack(drawn, dim=1)


class Rows:
    """The rows of a streaming model, each free or with a conversation. `open_rows` makes it.

    Args:
        lm_gen (RowLMGen): streaming.
        watches (Sequence[StepWatch]): what looks on.
    Attributes:
        heard (list[int]): frames of the user that Moshi has heard, for each row.
    """

    def __init__(self, lm_gen: RowLMGen, watches: Sequence[StepWatch] = ()):
        # As in all of Moshi's models; what follows the first step relies on it.
        assert lm_gen.max_delay >= 1, f"max_delay {lm_gen.max_delay}"
        self.lm_gen = lm_gen
        self.watches = watches
        self.heard = [0] * lm_gen.seeds.shape[0]

    @property
    def device(self) -> torch.device:
        return self.lm_gen.lm_model.device

    def spoken(self, row: int) -> int:
        """Frames that Moshi has spoken: a frame is complete `max_delay` steps after its first token."""
        return max(0, self.heard[row] - (self.lm_gen.max_delay - 1))

    @torch.no_grad()
    def start(self, row: int, seed: int) -> None:
        """A new conversation in a row: nothing of what was there before is left.

        Raises:
            ValueError: the seed is negative or has more than 63 bits.
        """
        if not 0 <= seed < 2**63:
            raise ValueError(f"sampling.seed must be from 0 to 2^63 - 1, got {seed}")
        restart_rows(self.lm_gen, self.mask([row]))
        self.go_on(row, seed, 0)

    def go_on(self, row: int, seed: int, heard: int) -> None:
        """The row's state is now that of a conversation with this seed that has heard so many frames."""
        self.lm_gen.seeds[row] = seed
        self.heard[row] = heard

    @torch.no_grad()
    def hear(self, codes: torch.Tensor, rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """One frame of the user in some rows. The others stand still.

        Args:
            codes: the user's, `[B, codebooks, 1]`; those of rows that do not hear are not read.
            rows: which hear.
        Returns:
            Moshi's next frame `[B, 1 + dep_q, 1]`, and the rows where one is complete; codes of other rows
            are none.
        """
        # LMGen's first step sees initial tokens in place of the user's, so the first frame is given twice:
        # from then on frame t of the user meets frame t of Moshi, as in training.
        fresh = [row for row in rows if self.heard[row] == 0]
        if fresh:
            self._step(codes, fresh)
        tokens = self._step(codes, rows)
        for row in rows:
            self.heard[row] += 1
        return tokens, [row for row in rows if self.spoken(row) > 0]

    def _step(self, codes: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        self.lm_gen.set_exec_mask(self.mask(rows))
        with ExitStack() as stack:
            for watch in self.watches:
                stack.enter_context(watch.step())
            return self.lm_gen.step(codes)

    def mask(self, rows: Sequence[int]) -> torch.Tensor:
        """`[B]`, true in `rows`."""
        mask = torch.zeros(len(self.heard), dtype=torch.bool)
        mask[list(rows)] = True
        return mask.to(self.device)

    def finish_watches(self) -> None:
        """Let what looks on judge all steps so far."""
        for watch in self.watches:
            watch.finish()


@contextmanager
def open_rows(
    model: LMModel,
    sampling: Sampling,
    rows: int,
    watches: Sequence[StepWatch] = (),
    max_chunk: int = 1,
) -> Iterator[Rows]:
    """Rows for conversations in codes; each begins with `start`. Without gradients.

    Args:
        model: in evaluation mode, not streaming.
        sampling: how tokens are drawn; seeds are the conversations' own.
        rows: how many.
        watches: what looks on, to the end.
        max_chunk: frames that a past may be given at once, see `inference.prefill`.
    """
    lm_gen = RowLMGen(model, sampling)
    with torch.no_grad(), lm_gen.streaming(rows):
        allow_chunks(model, max_chunk)
        opened = Rows(lm_gen, watches)
        yield opened
        opened.finish_watches()
