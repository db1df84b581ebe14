"""What knows nothing of prompts: checks of fields, eval mode and back, NaN explained, shards, whole files."""
