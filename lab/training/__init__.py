"""What a training run is made of: its settings, batches, optimizer, evaluation, log and costs."""
