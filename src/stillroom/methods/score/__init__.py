"""Score distillation: one- and few-step generators from a frozen diffusion teacher."""
