"""File formats of a converted split: FFCV's .beton and WebDataset's tar shards."""
