"""Images from prompts, by pipelines of diffusers."""
