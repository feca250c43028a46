"""Images of records: fetched over HTTP, or read from local archives, then decoded and encoded."""
