"""Training: the loop, the step, losses, optimizer and schedule, averaged weights, and what a run reports of itself."""
