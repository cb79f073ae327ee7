"""The sample rate of all that is spoken, that of Mimi; apart, as it is wanted without torch."""

SAMPLE_RATE_HZ = 24_000
