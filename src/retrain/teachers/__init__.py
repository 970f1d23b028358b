"""Models that a student learns from by their log-probabilities."""
