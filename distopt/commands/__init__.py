"""The command ``distopt``."""
