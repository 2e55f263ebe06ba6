"""A tone for the network, and the pitch that it hears."""

import numpy as np

# What the network was trained on: frames of 1024 samples, 16000 a second.
SAMPLES, RATE = 1024, 16000
# The pitch of the first bin, and the distance of bins, in cents above 10 Hz.
FIRST, DISTANCE = 1997.3794084376191, 20.0
# How many bins on either side of the most probable one are averaged.
NEIGHBOURS = 4


def tone(hertz: float) -> np.ndarray:
    """Return a frame of a tone, (1, 1024, 1, 1), with mean 0 and standard deviation 1."""
    samples = np.sin(2 * np.pi * hertz * np.arange(SAMPLES) / RATE)
    samples = (samples - samples.mean()) / samples.std()
    return samples.astype(np.float32).reshape(1, SAMPLES, 1, 1)


def pitch(probabilities: np.ndarray) -> float:
    """Return the pitch in Hz: the mean of bins around the most probable one, by probability."""
    top = int(probabilities.argmax())
    bins = np.arange(max(top - NEIGHBOURS, 0), min(top + NEIGHBOURS + 1, len(probabilities)))
    cents = np.average(FIRST + DISTANCE * bins, weights=probabilities[bins])
    return float(10 * 2 ** (cents / 1200))
