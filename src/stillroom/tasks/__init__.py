"""One room per kind of model: what a run reads, what the student becomes, how it is shown, measured and exported."""
