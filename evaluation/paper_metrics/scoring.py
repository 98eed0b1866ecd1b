"""Scores of clips and outcomes of pairs, all from the NLL of each frame and codebook."""

import numpy as np

PRIMARY = "w100_mean"
SEMANTIC_WEIGHT = 100.0
# Weights of the semantic codebook and of each acoustic one. 100 and 1 are those that Moshi is trained with.
WEIGHTINGS = {
    "w100": (SEMANTIC_WEIGHT, 1.0),
    "semantic": (1.0, 0.0),
    "acoustic": (0.0, 1.0),
    "uniform": (1.0, 1.0),
}
SCORINGS = tuple(f"{weighting}_{kind}" for weighting in WEIGHTINGS for kind in ("mean", "sum"))
# Scores closer than float32 can tell are a tie: equal clips in different batches differ in their last bits.
TIE_TOLERANCE = 1e-6


def clip_scores(nll: np.ndarray) -> dict[str, float]:
    """Log-likelihood of a clip under each scoring; higher is likelier.

    Args:
        nll: in nats, `[T, codebooks]`, the semantic codebook first; NaN where there is no target.
    Returns:
        Sums of weight x log-likelihood over all targets, and the same divided by the sum of their weights.
    """
    codebooks = nll.shape[1]
    totals = np.nansum(nll, axis=0, dtype=np.float64)
    counts = (~np.isnan(nll)).sum(axis=0)
    scores = {}
    for name, (semantic, acoustic) in WEIGHTINGS.items():
        weights = np.array([semantic] + [acoustic] * (codebooks - 1))
        scores[f"{name}_mean"] = float(-(weights @ totals) / (weights @ counts))
        scores[f"{name}_sum"] = float(-(weights @ totals))
    return scores


def outcome(positive: float, negative: float) -> float:
    """1 where the right clip is likelier, 0.5 for a tie, 0 otherwise."""
    assert np.isfinite(positive)
    assert np.isfinite(negative)
    if abs(positive - negative) <= TIE_TOLERANCE * max(abs(positive), abs(negative)):
        return 0.5
    return float(positive > negative)
