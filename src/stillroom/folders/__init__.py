"""Reading and writing model folders in the layouts of diffusers and transformers."""
