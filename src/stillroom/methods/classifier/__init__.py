"""Recognition, dense prediction and transfer: classifiers taught by soft labels."""
