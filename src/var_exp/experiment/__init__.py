"""From a Hydra configuration to a run: the only package that knows Hydra."""
