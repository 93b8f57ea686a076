"""The laboratory of hosts and links."""
