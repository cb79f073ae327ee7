"""What a run takes, before it starts and as it starts."""
