"""What every command of the integrations runs on: settings by field and flag, ranks that start and end, a journal."""
