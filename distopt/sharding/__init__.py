"""Parameters sharded inside a node, gradients reduced between nodes."""
