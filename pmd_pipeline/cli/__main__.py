"""`python -m pmd_pipeline.cli`."""

from pmd_pipeline.cli import main

if __name__ == "__main__":
    main()
