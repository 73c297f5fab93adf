"""Messages over a network, their format, and the client at the other end."""
