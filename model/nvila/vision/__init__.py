"""From images and frames to visual tokens: tiling, merging, projecting."""
