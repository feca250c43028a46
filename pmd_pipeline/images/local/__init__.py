"""Images on the user's disk, in any form; no request is sent for them."""
