"""Small recipes for a reader's own model: tasks weighted by uncertainty, self-distillation, bags, a plain trainer."""
