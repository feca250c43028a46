"""Lock files: a dataset without its images, and the rebuild of the dataset from one."""
