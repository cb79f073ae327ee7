"""`python -m finetune SUBCOMMAND` is `moshi-ttt SUBCOMMAND`, for launchers that want a module."""

from finetune.cli import main

if __name__ == "__main__":
    main()
