"""Language: text encoders and language models taught by larger ones."""
