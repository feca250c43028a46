"""Filters: predicates on captions, image sizes and pixels, each counted under its own name."""
