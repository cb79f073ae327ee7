"""Does test-time training help? Loss by position, paired likelihood, and health of speech.

`periodic.py` is the loss that a training run computes now and then; everything else belongs to
`moshi-ttt evaluate`, which begins in `run.py`.
"""
