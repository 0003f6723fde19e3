"""Flax models as pure functions on plain parameter trees. Nothing of reinforcement learning here."""
