"""A step's time, predicted: what compressing the gradients would cost and save, before anything is trained."""
