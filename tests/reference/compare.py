"""How close two sets of logits are."""

import numpy as np


def sqnr(reference, ours):
    """Signal to quantization noise in dB, over all values."""
    reference, ours = np.asarray(reference, np.float64), np.asarray(ours, np.float64)
    noise = np.square(reference - ours).sum()
    return float(10 * np.log10(np.square(reference).sum() / noise)) if noise > 0 else float("inf")


def agreement(reference, ours):
    """Share of rows with the same largest value."""
    return float((np.argmax(reference, -1) == np.argmax(ours, -1)).mean())


def relative_error(reference, ours):
    """Largest difference, relative to the largest reference value."""
    reference, ours = np.asarray(reference, np.float64), np.asarray(ours, np.float64)
    return float(np.abs(reference - ours).max() / np.abs(reference).max())


def cosine(a, b):
    """Cosine similarity of each row."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
