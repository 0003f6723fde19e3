"""Multi-turn reinforcement learning of language-model agents in text worlds, in JAX."""
