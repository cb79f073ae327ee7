"""Moshi's own arithmetic, made fast."""
