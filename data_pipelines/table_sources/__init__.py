"""Tables of other projects become ours: one module per layout, detection, merging, the outlier policy and writing."""
