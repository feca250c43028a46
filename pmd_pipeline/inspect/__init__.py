"""What a person asks of sources and datasets: their numbers, one record, two manifests."""
