"""What knows nothing of prompts: checks of fields, eval mode, NaN explained, random states, shards, whole files."""
