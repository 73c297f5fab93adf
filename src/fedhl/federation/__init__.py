"""One round of clients and server, in this process or through any other engine."""
