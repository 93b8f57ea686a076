"""Attachments: the places where a kind of trainer lets us meet its gradients. One kind a file."""
