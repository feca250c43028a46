"""Images that the user already has, wherever they came from: no request is made for them."""
