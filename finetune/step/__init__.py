"""The arithmetic of one optimizer step: loss, gradients, update."""
