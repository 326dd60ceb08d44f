"""Training: one visible loop that takes the loss and the batches as arguments."""
