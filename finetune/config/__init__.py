"""What a run can be told: its options, how they are read and checked, and their page in docs."""
