"""Object detection: the model on torchvision's parts, its task, average precision, pictures."""
