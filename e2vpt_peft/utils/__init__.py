"""What knows nothing of prompts: fields, a model put back, eval mode, NaN, random states, shards, files, images."""
