"""Trainer, stages, GradCache, optimizer, checkpoints, several processes, dev evaluation."""
