"""TTT-Linear and TTT-MLP: their definition, and their fast forms."""
