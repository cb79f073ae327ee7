"""The streams whose losses are told apart."""

STREAM_TITLES = {
    "text": "text, with padding",
    "words": "text, words only",
    "first_codebook": "first codebook",
    "other_codebooks": "other codebooks",
}
STREAMS = tuple(STREAM_TITLES)
"""`words` are the targets of the text stream that are no padding."""
