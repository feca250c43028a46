"""The report page: one HTML file with counts, reasons, charts and samples of a dataset."""
