"""Demonstration assets: synthetic dialogues, a small tokenizer and a small Mimi."""
