"""Train again, and publish only what is better than the model that the repository has; for CI and for people.

    python scripts/retrain.py CONFIG [--set KEY=VALUE] [--margin 2] [--force] [--pull-request]
                              [--summary FILE] [--json] [--runs DIR]
    python scripts/retrain.py CONFIG --on hf-jobs [--flavor a10g-large] [--timeout 6h] [--package GIT|WHEEL] [--no-wait]

    0 published   3 not better   4 skipped: it would be the same   1, 2 failed   75 another one is running   130 stopped

Needs tunepress installed (`pip install .`); `--help` tells the rest.
"""

from __future__ import annotations

from pipeline.cli.retrain import main

if __name__ == "__main__":
    main()
