"""Queue, bus and cache in the server process, blobs in a folder: all that one server on one machine needs."""
