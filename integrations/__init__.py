"""Complete models and recipes trained with distopt's plugins."""
