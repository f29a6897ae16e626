"""The store and the blobs on MongoDB: one replica set that many servers share."""
