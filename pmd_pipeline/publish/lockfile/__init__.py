"""A dataset without its images: what it takes to fetch them again, and to prove them the same."""
