"""Spoken facts: what a user tells, and asks for again beyond the reach of attention."""

from finetune.spoken.facts import ACKNOWLEDGEMENTS, KINDS, NAMES, Fact, FactKind

__all__ = ["ACKNOWLEDGEMENTS", "KINDS", "NAMES", "Fact", "FactKind"]
