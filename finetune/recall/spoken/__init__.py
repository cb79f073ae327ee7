"""Recall of spoken facts: dialogues in sound, which a user tells and asks in."""
