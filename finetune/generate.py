"""The earlier name of `finetune.inference` still serves programs that import it."""

from finetune.inference import load_for_inference

__all__ = ["load_for_inference"]
