"""What quantize, prune, share and distill are made of: packed weights, tied layers, and the folder that holds both."""
