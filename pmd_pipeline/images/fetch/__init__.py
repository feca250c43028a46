"""HTTP client for images: rate limits, robots.txt, routes, and the meaning of responses."""
