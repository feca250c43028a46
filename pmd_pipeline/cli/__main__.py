"""`python -m pmd_pipeline.cli`."""

from pmd_pipeline.cli import main

main()
