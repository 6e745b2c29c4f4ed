"""Text-to-image denoisers: where methods for denoisers meet captions."""
