"""Who the processes of a run are, and what each of them holds."""
