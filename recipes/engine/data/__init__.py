"""Images and labels: sets, files, crops and augmentation."""
