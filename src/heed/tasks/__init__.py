"""Data made in memory. Each task states the loss of a perfect model, so a curve has a floor."""
