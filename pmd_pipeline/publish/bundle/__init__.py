"""A dataset's papers in one folder or tar: all that rebuilds, checks, describes and trains."""
