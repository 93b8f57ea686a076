"""The pictures of docs/concepts: what each page says, computed by the code that it is about, and drawn."""
