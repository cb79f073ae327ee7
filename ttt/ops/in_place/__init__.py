"""In-Place TTT: its definition, and its fast forms for sequences and for streams."""
