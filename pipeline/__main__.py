"""`python -m pipeline` is the `tunepress` command."""

from pipeline.cli import main

main()
