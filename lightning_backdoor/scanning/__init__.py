"""Every training sample once, in the order of the dataset, isolated from the training around it."""
