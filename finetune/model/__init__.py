"""From a configuration to a model with its weights in it."""
