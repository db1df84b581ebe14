"""What knows nothing of prompts: fields checked, a model put back, eval mode and back, NaN, shards, files."""
