"""Images from captions, in a fixed space of text features and latents."""
