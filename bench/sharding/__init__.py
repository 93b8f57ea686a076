"""What a sharded step costs beside torch's own hybrid sharding, over networks of several speeds."""
