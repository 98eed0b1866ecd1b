"""What a TTT layer is made of, and which layers of a transformer become hybrid."""

from dataclasses import dataclass

from moshi_ttt.kernels.choice import KERNELS

SSM_LAYERS = ("ttt_linear", "ttt_mlp")
GATES = ("residual", "convex")
INNER_INITS = ("scaled", "published")


@dataclass
class TTTConfig:
    """Settings of the hybrid layers. Field names are those of the configuration group `ttt`."""

    enable: bool = True
    """Graft TTT layers. False leaves plain Moshi."""

    layers: str = "middle"
    """Which temporal layers become hybrid: "all", "middle" (the middle half), "none", a list
    "15,16,31" or ranges "8-23" (both ends included), also mixed."""

    ssm_layer: str = "ttt_mlp"
    """The inner model: "ttt_linear" (one linear layer) or "ttt_mlp" (see `ttt_mlp_layers`)."""

    ttt_mlp_layers: int = 2
    """Linear layers of the inner MLP; hidden layers are 4 x the head width. Ignored by ttt_linear."""

    num_heads: int | None = None
    """TTT heads. None means as many as the host's attention. Fewer heads make the projections
    smaller: 8 of 128 cost 16.8 M parameters a layer at Moshi's size, 32 cost 67 M."""

    head_dim: int | None = None
    """Width of a TTT head (even). None means the host's."""

    mini_batch_size: int = 16
    """Tokens (frames of 80 ms) that share one set of starting weights in the inner loop."""

    base_lr: float = 8.0
    """Inner learning rate: a token's step is base_lr / head_dim x sigmoid(...). 0 freezes the inner
    model. Published values are 1.0 for TTT-Linear and 0.1 for TTT-MLP (arXiv 2504.05298); TTT-MLP learned
    associative recall with 8, and not with 0.1 in as many steps (docs/recall.md)."""

    inner_lr_factors: list[float] | None = None
    """Factors of the inner learning rate, one for each linear layer of the inner model from first to last; 0
    freezes a layer. The Triton kernels do not take them. None: 1 for all."""

    inner_init: str = "scaled"
    """How the learned starting weights of the inner model are drawn: "published" is normal(0, 0.02)
    everywhere; "scaled" is that for ttt_linear, and for ttt_mlp standard deviation 1 in the first
    layer and 1 / sqrt(fan-in) after, so that hidden features of a unit-norm key have unit scale."""

    normalize_target: bool = True
    """Target of the inner loss: True normalises v - k over the head and applies the inner LayerNorm's
    weight and bias; False takes v - k as it is (TTT-LM)."""

    max_inner_change: float | None = 3.0
    """Keeps the inner state of an endless stream bounded: after each mini-batch, a head's inner layer that is
    further than this from its learned start is drawn back to that distance (Frobenius norm of the difference
    of weight and bias together). The unit is the norm of a matrix that gives outputs of unit scale. It
    depends on the layer's widths alone, not on what was learned: sqrt(d_in x d_out) for the layer that reads
    the keys, whose norm is 1 (the only layer of ttt_linear: the head width), and sqrt(d_out) for the later
    layers of ttt_mlp. The "scaled" start of ttt_mlp has a norm of 1 unit, that of ttt_linear 0.02. Learning
    2,000 random tokens with base_lr 8 and head width 32 (128) moves ttt_linear by 0.45 (0.11) units and the
    last layer of ttt_mlp by 1.9 (1.2). Without a bound, the LayerNorm in the inner loss, whose gradient is
    orthogonal to its input, lets the last layer grow with the fourth root of time: with default settings it
    passes 3 after 40 minutes of noise or speech (docs/inner_state_100k_frames.png). None sets no bound."""

    learned_token_scale: bool = False
    """Learn an offset to the step scale 1 / (position + 1) of each position in a mini-batch."""

    rope_theta: float = 10000.0
    """Base of the rotary embedding over positions inside a mini-batch."""

    gate: str = "residual"
    """How the TTT output m joins attention's update a: "residual" is x + a + tanh(alpha) m, "convex"
    is x + alpha a + (1 - alpha) m with alpha the sigmoid of a parameter."""

    gate_init: float = 0.1
    """residual: initial alpha. convex: initial weight 1 - alpha of m. 0 switches the branch off: the
    pretrained model's outputs stay as they were."""

    ttt_layer_context: int | None = None
    """Attention window of the hybrid layers, in frames. None leaves the host's (Moshi: 3000)."""

    non_ttt_layer_context: int | None = None
    """Attention window of the other temporal layers, in frames. None leaves the host's."""

    persistent_states: bool = False
    """Train on recordings longer than a clip: each batch row goes through its recording in chunks of
    duration_sec and carries its inner weights, attention keys and values and positions from one to the next.
    Gradients stop at the edges of chunks. False starts every clip from the learned weights."""

    kernel: str = "auto"
    """What computes the inner loop of training and of whole mini-batches: "eager" (torch operations),
    "triton" (fused kernels for a GPU, ttt_linear and ttt_mlp of two layers), "native" (C++ for the CPU,
    compiled by g++ when first used), or "auto": the fastest that can run, and on a GPU has been tried there,
    which those of ttt_linear have not. Single frames of a stream of ttt_linear have no Triton kernels."""

    scan_checkpoint_group_size: int = 16
    """Mini-batches whose inner activations the backward pass makes again together: more of them take more
    memory, fewer have the inner weights kept more often. 0: all of the sequence together."""

    @property
    def inner_layers(self) -> int:
        """Number of linear layers of the inner model."""
        return 1 if self.ssm_layer == "ttt_linear" else self.ttt_mlp_layers

    def validate(self) -> None:
        """Raise ValueError for the first setting that cannot work, with what it should be."""
        _one_of("ttt.ssm_layer", self.ssm_layer, SSM_LAYERS)
        _one_of("ttt.gate", self.gate, GATES)
        _one_of("ttt.inner_init", self.inner_init, INNER_INITS)
        _one_of("ttt.kernel", self.kernel, KERNELS)
        _at_least("ttt.mini_batch_size", self.mini_batch_size, 1)
        _at_least("ttt.base_lr", self.base_lr, 0)
        _at_least("ttt.scan_checkpoint_group_size", self.scan_checkpoint_group_size, 0)
        if self.max_inner_change is not None and not self.max_inner_change > 0:
            raise ValueError(
                f"ttt.max_inner_change must be above 0, or null for no bound; got {self.max_inner_change} "
                "(ttt.base_lr=0 freezes the inner model)"
            )
        if self.ssm_layer == "ttt_mlp":
            _at_least("ttt.ttt_mlp_layers", self.ttt_mlp_layers, 2, "use ssm_layer=ttt_linear for one layer")
        if self.inner_lr_factors is not None:
            self._check_factors(self.inner_lr_factors)
        for name in ("num_heads", "ttt_layer_context", "non_ttt_layer_context"):
            value = getattr(self, name)
            if value is not None:
                _at_least(f"ttt.{name}", value, 1)
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            raise ValueError(f"ttt.head_dim must be even (rotary pairs), got {self.head_dim}")
        if self.gate == "convex" and not 0 <= self.gate_init < 1:
            raise ValueError(
                f"ttt.gate_init of the convex gate is the weight of the TTT branch, in [0, 1); "
                f"got {self.gate_init}"
            )

    def _check_factors(self, factors: list[float]) -> None:
        numbers = all(factor >= 0 for factor in factors) and any(factor > 0 for factor in factors)
        if len(factors) != self.inner_layers or not numbers:
            raise ValueError(
                f"ttt.inner_lr_factors must be {self.inner_layers} numbers of at least 0, one for each layer "
                f"of the inner model, not all 0; got {factors} (ttt.base_lr=0 freezes the inner model)"
            )
        if self.kernel == "triton":
            raise ValueError(
                f"ttt.kernel=triton takes no ttt.inner_lr_factors; got {factors}: use ttt.kernel=auto"
            )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _at_least(name: str, value: float, minimum: float, remedy: str = "") -> None:
    if not value >= minimum:
        hint = f" ({remedy})" if remedy else ""
        raise ValueError(f"{name} must be at least {minimum}; got {value}{hint}")


def ttt_layer_indices(layers: str, num_layers: int) -> list[int]:
    """Indices that `TTTConfig.layers` names in a transformer of `num_layers` layers.

    Args:
        layers (str): "all", "middle", "none", or indices and inclusive ranges: "15,16,31", "8-23".
        num_layers (int): layers of the transformer.
    Returns:
        Sorted indices, each once.
    Raises:
        ValueError: the text names no layer, is malformed, or names one that does not exist.
    """
    named = {
        "all": list(range(num_layers)),
        "middle": list(range(num_layers // 4, num_layers // 4 + num_layers // 2)),
        "none": [],
    }
    key = layers.strip().lower()
    if key in named:
        return named[key]
    indices: set[int] = set()
    for part in key.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(
                f'ttt.layers must be "all", "middle", "none" or indices like "15,16,31" or "8-23"; '
                f"got {layers!r}"
            )
        start, stop = int(first), int(last) if dash else int(first)
        if start > stop:
            raise ValueError(f"ttt.layers has the empty range {part.strip()!r}; write the lower index first")
        indices.update(range(start, stop + 1))
    beyond = sorted(i for i in indices if i >= num_layers)
    if beyond:
        raise ValueError(
            f"ttt.layers={layers!r} names layer {beyond[0]}, but the model has {num_layers} layers: "
            f"0 to {num_layers - 1}"
        )
    return sorted(indices)
