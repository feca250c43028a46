"""A dataset for others: lock file, bundle, exports."""
