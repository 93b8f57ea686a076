"""What compression does to the loss: at equal steps and at equal time, on the DALL-E demo and on text."""
