"""The parts of a training run: settings, batches, optimizer, evaluation, log and costs."""
