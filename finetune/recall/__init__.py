"""An experiment on memory: what was said beyond the reach of attention is asked for again."""
