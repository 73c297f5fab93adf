"""What crosses a network: messages, their format, and the client at the other end."""
